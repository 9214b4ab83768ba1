module

/-!
The complement distribution and its axioms.

`target` is over a finite list of options, with rejection counts `v`, rounds `T` and a base measure `μ`,

    w i = T - min (v i) T + 1        P i = μ i * w i / ∑ j, μ j * w j

in exact rational arithmetic. Counts above `T` are clipped. The base measure is any positive rational
function, not necessarily normalised; `μ = 1` is the uniform one.

`ownTarget` is the same where every option has rounds `n` of its own and `m` is presumed of one that was never
up, worth `k` rounds: the function of `src/buleyean_rl/objectives/complement.py::exact_target`,

    r i = (n i - min (v i) (n i) + k * m) / ((n i + k) * m)        P i = μ i * r i / ∑ j, μ j * r j

and `cappedTarget` where ratios above 1 count as 1. With `m = k = 1` and one `n i = T` it is `target`
(`ownTarget_equal`).
-/

@[expose] public section

namespace Buleyean

variable {ι : Type}

/-- The weight left to an option rejected `v` times in `T` rounds. -/
def weight (T v : Nat) : Nat := T - min v T + 1

/-- The unnormalised complement distribution. -/
def mass (μ : ι → Rat) (T : Nat) (v : ι → Nat) (i : ι) : Rat := μ i * weight T (v i)

/-- The sum of `f` over the options. -/
def sumOver : List ι → (ι → Rat) → Rat
  | [], _ => 0
  | i :: options, f => f i + sumOver options f

/-- The complement distribution. -/
def target (options : List ι) (μ : ι → Rat) (T : Nat) (v : ι → Nat) (i : ι) : Rat :=
  mass μ T v i / sumOver options (mass μ T v)

/-! ### Sums -/

@[simp] theorem sumOver_nil (f : ι → Rat) : sumOver [] f = 0 := rfl

@[simp] theorem sumOver_cons (a : ι) (l : List ι) (f : ι → Rat) : sumOver (a :: l) f = f a + sumOver l f :=
  rfl

theorem sumOver_congr {l : List ι} {f g : ι → Rat} (h : ∀ i ∈ l, f i = g i) : sumOver l f = sumOver l g := by
  induction l with
  | nil => simp
  | cons a l ih => simp [h a, ih fun i hi => h i (by simp [hi])]

theorem sumOver_add (l : List ι) (f g : ι → Rat) :
    sumOver l (fun i => f i + g i) = sumOver l f + sumOver l g := by
  induction l with
  | nil => simp [Rat.add_zero]
  | cons a l ih => simp only [sumOver_cons]; grind

theorem sumOver_mul_right (l : List ι) (f : ι → Rat) (c : Rat) :
    sumOver l (fun i => f i * c) = sumOver l f * c := by
  induction l with
  | nil => simp [Rat.zero_mul]
  | cons a l ih => simp only [sumOver_cons]; grind

theorem sumOver_le {l : List ι} {f g : ι → Rat} (h : ∀ i ∈ l, f i ≤ g i) : sumOver l f ≤ sumOver l g := by
  induction l with
  | nil => simp [Rat.le_refl]
  | cons a l ih =>
    have ha := h a (by simp)
    have ih := ih fun i hi => h i (by simp [hi])
    simp only [sumOver_cons]; grind

/-- A sum grows strictly when no term shrinks and one grows. -/
theorem sumOver_lt {l : List ι} {f g : ι → Rat} (h : ∀ i ∈ l, f i ≤ g i) {j : ι} (hj : j ∈ l)
    (hlt : f j < g j) :
    sumOver l f < sumOver l g := by
  induction l with
  | nil => simp at hj
  | cons a l ih =>
    have ha := h a (by simp)
    have hl : ∀ i ∈ l, f i ≤ g i := fun i hi => h i (by simp [hi])
    simp only [sumOver_cons]
    rcases List.mem_cons.mp hj with rfl | hj
    · have := sumOver_le hl; grind
    · have := ih hl hj; grind

theorem sumOver_nonneg {l : List ι} {f : ι → Rat} (h : ∀ i ∈ l, 0 ≤ f i) : 0 ≤ sumOver l f := by
  induction l with
  | nil => simp [Rat.le_refl]
  | cons a l ih =>
    have ha := h a (by simp)
    have ih := ih fun i hi => h i (by simp [hi])
    simp only [sumOver_cons]; grind

theorem sumOver_pos {l : List ι} {f : ι → Rat} (h : ∀ i ∈ l, 0 < f i) {j : ι} (hj : j ∈ l) :
    0 < sumOver l f := by
  have := sumOver_lt (f := fun _ => 0) (fun i hi => Rat.le_of_lt (h i hi)) hj (h j hj)
  have zero : sumOver l (fun _ => (0 : Rat)) = 0 := by
    have := sumOver_mul_right l (fun _ => (0 : Rat)) 0
    simp only [Rat.mul_zero] at this; exact this
  grind

/-- A term is at most the sum of nonnegative terms. -/
theorem le_sumOver {l : List ι} {f : ι → Rat} (h : ∀ i ∈ l, 0 ≤ f i) {j : ι} (hj : j ∈ l) :
    f j ≤ sumOver l f := by
  induction l with
  | nil => simp at hj
  | cons a l ih =>
    have ha := h a (by simp)
    have hl : ∀ i ∈ l, 0 ≤ f i := fun i hi => h i (by simp [hi])
    simp only [sumOver_cons]
    rcases List.mem_cons.mp hj with rfl | hj
    · have := sumOver_nonneg hl; grind
    · have := ih hl hj; grind

theorem sumOver_perm {l l' : List ι} (p : l.Perm l') (f : ι → Rat) : sumOver l f = sumOver l' f := by
  induction p with
  | nil => rfl
  | cons a _ ih => simp [ih]
  | swap a b l => simp only [sumOver_cons]; grind
  | trans _ _ h₁ h₂ => exact h₁.trans h₂

/-! ### Fractions -/

theorem zero_lt_one : (0 : Rat) < 1 := by decide

theorem div_lt_div_of_mul_lt {a b c d : Rat} (hb : 0 < b) (hd : 0 < d) (h : a * d < c * b) :
    a / b < c / d := by
  rw [Rat.div_lt_iff hb, show c / d * b = c * b / d by grind, Rat.lt_div_iff hd]
  exact h

theorem mul_lt_mul_pos {a b c : Rat} (hc : 0 < c) (h : a < b) :
    c * a < c * b := (Rat.mul_lt_mul_left hc).mpr h

theorem mul_le_mul_nonneg {a b c : Rat} (hc : 0 ≤ c) (h : a ≤ b) : c * a ≤ c * b :=
  Rat.mul_le_mul_of_nonneg_left h hc

/-! ### Weights -/

/-- No weight falls below the sliver: every option keeps at least 1. -/
theorem weight_pos (T v : Nat) : 1 ≤ weight T v := by unfold weight; omega

/-- An option never rejected has all the rounds and the sliver. -/
theorem weight_unrejected (T : Nat) : weight T 0 = T + 1 := by unfold weight; omega

/-- The weight is exactly the sliver if, and only if, the option was rejected in every round. -/
theorem weight_sliver {T v : Nat} : weight T v = 1 ↔ T ≤ v := by unfold weight; omega

/-- Fewer rejections, more weight, as long as the smaller count is below the clip. -/
theorem weight_lt {T v v' : Nat} (h : v < v')
    (hT : v < T) : weight T v' < weight T v := by unfold weight; omega

/-- Weights never grow with rejections. -/
theorem weight_le {T v v' : Nat} (h : v ≤ v') : weight T v' ≤ weight T v := by unfold weight; omega

theorem weight_cast_pos (T v : Nat) : (0 : Rat) < weight T v := by
  have := weight_pos T v
  exact_mod_cast (show 0 < weight T v by omega)

theorem mass_pos {μ : ι → Rat} {T : Nat} {v : ι → Nat} {i : ι} (h : 0 < μ i) : 0 < mass μ T v i :=
  Rat.mul_pos h (weight_cast_pos T (v i))

/-! ### The axioms -/

section
variable {options : List ι} {μ : ι → Rat} {T : Nat} {v : ι → Nat} {i j : ι}

theorem total_pos (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) : 0 < sumOver options (mass μ T v) :=
  sumOver_pos (fun k hk => mass_pos (hμ k hk)) hi

/-- Positivity: no option ever dies. -/
theorem target_pos (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) : 0 < target options μ T v i := by
  unfold target
  rw [Rat.lt_div_iff (total_pos hμ hi), Rat.zero_mul]
  exact mass_pos (hμ i hi)

/-- Normalisation: over any nonempty list of options the target sums to exactly 1. -/
theorem target_sum (hμ : ∀ k ∈ options, 0 < μ k) (hne : options ≠ []) :
    sumOver options (target options μ T v) = 1 := by
  obtain ⟨i, hi⟩ := List.exists_mem_of_ne_nil options hne
  have hpos := total_pos (T := T) (v := v) hμ hi
  have : sumOver options (target options μ T v) =
      sumOver options (mass μ T v) * (sumOver options (mass μ T v))⁻¹ := by
    rw [← sumOver_mul_right]
    exact sumOver_congr fun k _ => by unfold target; grind
  grind

/-- Monotonicity: the more rejected of two options has the smaller ratio to its base weight. -/
theorem target_monotone (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) (hj : j ∈ options)
    (h : v i < v j) (hT : v i < T) : target options μ T v j / μ j < target options μ T v i / μ i := by
  have hpos := total_pos (T := T) (v := v) hμ hi
  have hw : (weight T (v j) : Rat) < weight T (v i) := by exact_mod_cast weight_lt h hT
  have ratio : ∀ k ∈ options,
      target options μ T v k / μ k = weight T (v k) / sumOver options (mass μ T v) := by
    intro k hk
    have := hμ k hk
    unfold target
    generalize sumOver options (mass μ T v) = S at *
    unfold mass; grind
  rw [ratio i hi, ratio j hj]
  refine div_lt_div_of_mul_lt hpos hpos ?_
  rw [Rat.mul_comm, Rat.mul_comm _ (sumOver _ _)]
  exact mul_lt_mul_pos hpos hw

/-- Under the uniform base measure monotonicity is about the probabilities themselves. -/
theorem target_monotone_uniform (hi : i ∈ options) (hj : j ∈ options) (h : v i < v j) (hT : v i < T) :
    target options (fun _ => 1) T v j < target options (fun _ => 1) T v i := by
  have := target_monotone (μ := fun _ => 1) (fun _ _ => zero_lt_one) hi hj h hT
  grind

/-- Equal counts, equal ratios; counts beyond the clip are equal counts. -/
theorem target_equal_counts (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) (hj : j ∈ options)
    (h : min (v i) T = min (v j) T) : target options μ T v i / μ i = target options μ T v j / μ j := by
  have hμi := hμ i hi
  have hμj := hμ j hj
  have hw : weight T (v i) = weight T (v j) := by unfold weight; omega
  unfold target mass
  rw [hw]
  grind

/-- Rejected in every round, an option keeps exactly the sliver: its base weight, once. -/
theorem target_sliver (h : T ≤ v i) : target options μ T v i = μ i / sumOver options (mass μ T v) := by
  unfold target mass
  rw [weight_sliver.mpr h]
  grind

/-- The target does not depend on the scale of the base measure. -/
theorem target_scale {c : Rat} (hc : 0 < c) :
    target options (fun k => c * μ k) T v i = target options μ T v i := by
  have : sumOver options (mass (fun k => c * μ k) T v) = sumOver options (mass μ T v) * c := by
    rw [← sumOver_mul_right]
    exact sumOver_congr fun k _ => by unfold mass; grind
  unfold target
  rw [this]
  unfold mass
  grind

end

/-! ### Any positive ratios -/

/-- The distribution that gives each option `r` times its base weight, up to a factor. -/
def tilt (options : List ι) (μ r : ι → Rat) (i : ι) : Rat :=
  μ i * r i / sumOver options (fun k => μ k * r k)

section
variable {options : List ι} {μ r : ι → Rat} {i j : ι}

theorem tilt_total_pos (hμ : ∀ k ∈ options, 0 < μ k) (hr : ∀ k, 0 < r k) (hi : i ∈ options) :
    0 < sumOver options (fun k => μ k * r k) :=
  sumOver_pos (fun k hk => Rat.mul_pos (hμ k hk) (hr k)) hi

theorem tilt_pos (hμ : ∀ k ∈ options, 0 < μ k) (hr : ∀ k, 0 < r k) (hi : i ∈ options) :
    0 < tilt options μ r i := by
  unfold tilt
  rw [Rat.lt_div_iff (tilt_total_pos hμ hr hi), Rat.zero_mul]
  exact Rat.mul_pos (hμ i hi) (hr i)

theorem tilt_sum (hμ : ∀ k ∈ options, 0 < μ k) (hr : ∀ k, 0 < r k) (hne : options ≠ []) :
    sumOver options (tilt options μ r) = 1 := by
  obtain ⟨i, hi⟩ := List.exists_mem_of_ne_nil options hne
  have hpos := tilt_total_pos hμ hr hi
  have : sumOver options (tilt options μ r) =
      sumOver options (fun k => μ k * r k) * (sumOver options (fun k => μ k * r k))⁻¹ := by
    rw [← sumOver_mul_right]
    exact sumOver_congr fun k _ => by unfold tilt; grind
  grind

theorem tilt_share (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) :
    tilt options μ r i / μ i = r i / sumOver options (fun k => μ k * r k) := by
  have := hμ i hi
  unfold tilt
  generalize sumOver options (fun k => μ k * r k) = S at *
  grind

/-- The smaller ratio, the smaller share of the base weight. -/
theorem tilt_monotone (hμ : ∀ k ∈ options, 0 < μ k) (hr : ∀ k, 0 < r k) (hi : i ∈ options) (hj : j ∈ options)
    (h : r j < r i) : tilt options μ r j / μ j < tilt options μ r i / μ i := by
  have hpos := tilt_total_pos hμ hr hi
  rw [tilt_share hμ hi, tilt_share hμ hj]
  refine div_lt_div_of_mul_lt hpos hpos ?_
  rw [Rat.mul_comm, Rat.mul_comm _ (sumOver _ _)]
  exact mul_lt_mul_pos hpos h

/-- Two options stand to each other as their own ratios say, whatever else there is. -/
theorem tilt_odds : tilt options μ r i * (μ j * r j) = tilt options μ r j * (μ i * r i) := by
  unfold tilt
  generalize sumOver options (fun k => μ k * r k) = S
  grind

end

/-! ### Rounds of their own, and what is presumed before them -/

/-- What is left of an option rejected `v` times in `n` rounds of its own, relative to one that was never up:
`m` is presumed of that one, and is worth `k` rounds. -/
def ratio (m k : Rat) (n v : Nat) : Rat := (((n - min v n : Nat) : Rat) + k * m) / (((n : Rat) + k) * m)

/-- A ratio, or 1 if it is above 1. -/
def capped (r : Rat) : Rat := if r ≤ 1 then r else 1

/-- The complement distribution of options with rounds of their own. -/
def ownTarget (options : List ι) (μ : ι → Rat) (m k : Rat) (n v : ι → Nat) : ι → Rat :=
  tilt options μ (fun i => ratio m k (n i) (v i))

/-- The same where nothing rises for having been accepted. -/
def cappedTarget (options : List ι) (μ : ι → Rat) (m k : Rat) (n v : ι → Nat) : ι → Rat :=
  tilt options μ (fun i => capped (ratio m k (n i) (v i)))

section
variable {m k : Rat} {n v v' : Nat}

theorem ratio_divisor_pos (hm : 0 < m) (hk : 0 < k) (n : Nat) : 0 < ((n : Rat) + k) * m := by
  have : (0 : Rat) ≤ n := by exact_mod_cast Nat.zero_le n
  exact Rat.mul_pos (by grind) hm

theorem ratio_pos (hm : 0 < m) (hk : 0 < k) (n v : Nat) : 0 < ratio m k n v := by
  have : (0 : Rat) ≤ (n - min v n : Nat) := by exact_mod_cast Nat.zero_le _
  have := Rat.mul_pos hk hm
  unfold ratio
  rw [Rat.lt_div_iff (ratio_divisor_pos hm hk n), Rat.zero_mul]
  grind

/-- Unseen is neutral: what was never up keeps its base weight. -/
theorem ratio_unseen (hm : 0 < m) (hk : 0 < k) (v : Nat) : ratio m k 0 v = 1 := by
  have h := Rat.mul_pos hk hm
  unfold ratio
  rw [show 0 - min v 0 = 0 by omega, show ((0 : Nat) : Rat) = 0 from rfl, Rat.zero_add, Rat.zero_add]
  generalize k * m = x at *
  grind

/-- In equal rounds the more rejected option keeps less. -/
theorem ratio_lt (hm : 0 < m) (hk : 0 < k) (h : v < v') (hn : v < n) : ratio m k n v' < ratio m k n v := by
  have hd := ratio_divisor_pos hm hk n
  have hw : ((n - min v' n : Nat) : Rat) < (n - min v n : Nat) := by
    exact_mod_cast (show n - min v' n < n - min v n by omega)
  unfold ratio
  refine div_lt_div_of_mul_lt hd hd ?_
  rw [Rat.mul_comm, Rat.mul_comm _ (((n : Rat) + k) * m)]
  exact mul_lt_mul_pos hd (by grind)

/-- Better than presumed rises: the ratio is above 1 exactly if more than `m` of the rounds accepted. -/
theorem ratio_above_iff (hm : 0 < m) (hk : 0 < k) :
    1 < ratio m k n v ↔ (n : Rat) * m < (n - min v n : Nat) := by
  unfold ratio
  rw [Rat.lt_div_iff (ratio_divisor_pos hm hk n)]
  constructor <;> intro h <;> grind

/-- Worse than presumed falls: below 1 exactly if less than `m` of the rounds accepted. -/
theorem ratio_below_iff (hm : 0 < m) (hk : 0 < k) :
    ratio m k n v < 1 ↔ ((n - min v n : Nat) : Rat) < n * m := by
  unfold ratio
  rw [Rat.div_lt_iff (ratio_divisor_pos hm hk n)]
  constructor <;> intro h <;> grind

/-- What was rejected whenever it was up keeps `k / (n + k)`, whatever is presumed. -/
theorem ratio_rejected (hm : 0 < m) (hk : 0 < k) (h : n ≤ v) : ratio m k n v = k / (n + k) := by
  have : (0 : Rat) ≤ n := by exact_mod_cast Nat.zero_le n
  have hs : (0 : Rat) < n + k := by grind
  have zero : n - min v n = 0 := by omega
  unfold ratio
  rw [zero, show ((0 : Nat) : Rat) = 0 from rfl, Rat.zero_add]
  generalize (n : Rat) + k = s at *
  grind

/-- With `m = 1` what was never rejected keeps its base weight, in however many rounds it was up. -/
theorem ratio_unrejected (hk : 0 < k) (n : Nat) : ratio 1 k n 0 = 1 := by
  have : (0 : Rat) ≤ n := by exact_mod_cast Nat.zero_le n
  have hs : (0 : Rat) < n + k := by grind
  unfold ratio
  rw [show n - min 0 n = n by omega, Rat.mul_one, Rat.mul_one]
  generalize (n : Rat) + k = s at *
  grind

/-- With `m = k = 1` it is the published weight, up to a factor. -/
theorem ratio_published (n v : Nat) : ratio 1 1 n v = (weight n v : Rat) / (weight n 0 : Rat) := by
  unfold ratio weight
  rw [show n - min 0 n + 1 = n + 1 by omega, Rat.mul_one, Rat.mul_one]
  push_cast
  rfl

theorem capped_pos {r : Rat} (h : 0 < r) : 0 < capped r := by unfold capped; split <;> grind

theorem capped_le_one (r : Rat) : capped r ≤ 1 := by unfold capped; split <;> grind

/-- Capping leaves the order of ratios below 1. -/
theorem capped_lt {r r' : Rat} (h : r < r') (h1 : r < 1) : capped r < capped r' := by
  unfold capped; split <;> split <;> grind

end

section
variable {options : List ι} {μ : ι → Rat} {m k : Rat} {n v : ι → Nat} {i j : ι}

/-- Positivity, with rounds of their own. -/
theorem ownTarget_pos (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hi : i ∈ options) :
    0 < ownTarget options μ m k n v i :=
  tilt_pos hμ (fun _ => ratio_pos hm hk _ _) hi

/-- Normalisation, with rounds of their own. -/
theorem ownTarget_sum (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hne : options ≠ []) :
    sumOver options (ownTarget options μ m k n v) = 1 :=
  tilt_sum hμ (fun _ => ratio_pos hm hk _ _) hne

/-- Monotonicity at equal rounds: the more rejected of two options has the smaller ratio to its base weight. -/
theorem ownTarget_monotone (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hi : i ∈ options)
    (hj : j ∈ options) (hn : n i = n j) (h : v i < v j) (hT : v i < n i) :
    ownTarget options μ m k n v j / μ j < ownTarget options μ m k n v i / μ i :=
  tilt_monotone hμ (fun _ => ratio_pos hm hk _ _) hi hj (by rw [← hn]; exact ratio_lt hm hk h hT)

/-- Two options stand to each other as their own counts say, whatever else was up: `P i : P j = μ i r i : μ j r j`. -/
theorem ownTarget_odds :
    ownTarget options μ m k n v i * (μ j * ratio m k (n j) (v j)) =
      ownTarget options μ m k n v j * (μ i * ratio m k (n i) (v i)) :=
  tilt_odds

/-- If nothing was ever up, the target is the base measure. -/
theorem ownTarget_unseen (hm : 0 < m) (hk : 0 < k) (hsum : sumOver options μ = 1) (hn : ∀ a, n a = 0) :
    ownTarget options μ m k n v i = μ i := by
  have each : ∀ a, μ a * ratio m k (n a) (v a) = μ a := fun a => by rw [hn a, ratio_unseen hm hk, Rat.mul_one]
  unfold ownTarget tilt
  rw [each i, sumOver_congr (fun a _ => each a), hsum]
  grind

/-- Positivity where ratios are capped. -/
theorem cappedTarget_pos (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hi : i ∈ options) :
    0 < cappedTarget options μ m k n v i :=
  tilt_pos hμ (fun _ => capped_pos (ratio_pos hm hk _ _)) hi

/-- Normalisation where ratios are capped. -/
theorem cappedTarget_sum (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hne : options ≠ []) :
    sumOver options (cappedTarget options μ m k n v) = 1 :=
  tilt_sum hμ (fun _ => capped_pos (ratio_pos hm hk _ _)) hne

/-- Monotonicity at equal rounds where ratios are capped, for an option that was worse than presumed. -/
theorem cappedTarget_monotone (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hi : i ∈ options)
    (hj : j ∈ options) (hn : n i = n j) (h : v i < v j) (hT : v i < n i)
    (hw : ((n j - min (v j) (n j) : Nat) : Rat) < n j * m) :
    cappedTarget options μ m k n v j / μ j < cappedTarget options μ m k n v i / μ i :=
  tilt_monotone hμ (fun _ => capped_pos (ratio_pos hm hk _ _)) hi hj
    (capped_lt (by rw [← hn]; exact ratio_lt hm hk h hT) ((ratio_below_iff hm hk).mpr hw))

/-- With `m = k = 1`, where all options have the same rounds, it is the published target. -/
theorem ownTarget_equal {T : Nat} (h : ∀ a, n a = T) : ownTarget options μ 1 1 n v i = target options μ T v i := by
  have hw := weight_cast_pos T 0
  have each : ∀ a, mass μ T v a = μ a * ratio 1 1 (n a) (v a) * (weight T 0 : Rat) := by
    intro a
    unfold mass
    rw [h a, ratio_published]
    generalize (weight T 0 : Rat) = w at *
    grind
  have total : sumOver options (mass μ T v) =
      sumOver options (fun a => μ a * ratio 1 1 (n a) (v a)) * (weight T 0 : Rat) := by
    rw [← sumOver_mul_right]
    exact sumOver_congr fun a _ => each a
  unfold ownTarget tilt target
  rw [each i, total]
  clear each total
  generalize μ i * ratio 1 1 (n i) (v i) = x
  generalize sumOver options (fun a => μ a * ratio 1 1 (n a) (v a)) = S
  generalize (weight T 0 : Rat) = w at *
  grind

end

end Buleyean
