module

/-!
The complement distribution and its axioms.

`target` is over a finite list of options, with rejection counts `v`, rounds `T` and a base measure `μ`,

    w i = T - min (v i) T + 1        P i = μ i * w i / ∑ j, μ j * w j

in exact rational arithmetic. Counts above `T` are clipped. The base measure is any positive rational
function, not necessarily normalised; `μ = 1` is the uniform one.

`ownTarget` is the same where every option has rounds `n` of its own, the function of
`src/buleyean_rl/objectives/complement.py::exact_target`:

    r i = (n i - min (v i) (n i) + 1) / (n i + 1)        P i = μ i * r i / ∑ j, μ j * r j

With one `n i = T` it is `target` (`ownTarget_equal`).
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

/-! ### Rounds of their own -/

/-- What is left of an option rejected `v` times in `n` rounds of its own, relative to one that was never up. -/
def ratio (n v : Nat) : Rat := (weight n v : Rat) / (weight n 0 : Rat)

/-- The unnormalised complement distribution of options with rounds of their own. -/
def ownMass (μ : ι → Rat) (n v : ι → Nat) (i : ι) : Rat := μ i * ratio (n i) (v i)

/-- The complement distribution of options with rounds of their own. -/
def ownTarget (options : List ι) (μ : ι → Rat) (n v : ι → Nat) (i : ι) : Rat :=
  ownMass μ n v i / sumOver options (ownMass μ n v)

theorem ratio_pos (n v : Nat) : 0 < ratio n v := by
  unfold ratio
  rw [Rat.lt_div_iff (weight_cast_pos n 0), Rat.zero_mul]
  exact weight_cast_pos n v

/-- What was never rejected keeps its base weight, in however many rounds it was up. -/
theorem ratio_unrejected (n : Nat) : ratio n 0 = 1 := by
  have h := weight_cast_pos n 0
  unfold ratio
  generalize (weight n 0 : Rat) = w at *
  grind

/-- In equal rounds the more rejected option keeps less. -/
theorem ratio_lt {n v v' : Nat} (h : v < v') (hn : v < n) : ratio n v' < ratio n v := by
  have hw : (weight n v' : Rat) < weight n v := by exact_mod_cast weight_lt h hn
  unfold ratio
  refine div_lt_div_of_mul_lt (weight_cast_pos n 0) (weight_cast_pos n 0) ?_
  rw [Rat.mul_comm (weight n v' : Rat), Rat.mul_comm (weight n v : Rat)]
  exact mul_lt_mul_pos (weight_cast_pos n 0) hw

section
variable {options : List ι} {μ : ι → Rat} {n v : ι → Nat} {i j : ι}

theorem ownMass_pos (h : 0 < μ i) : 0 < ownMass μ n v i := Rat.mul_pos h (ratio_pos (n i) (v i))

theorem ownTotal_pos (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) : 0 < sumOver options (ownMass μ n v) :=
  sumOver_pos (fun k hk => ownMass_pos (hμ k hk)) hi

/-- Positivity, with rounds of their own. -/
theorem ownTarget_pos (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) : 0 < ownTarget options μ n v i := by
  unfold ownTarget
  rw [Rat.lt_div_iff (ownTotal_pos hμ hi), Rat.zero_mul]
  exact ownMass_pos (hμ i hi)

/-- Normalisation, with rounds of their own. -/
theorem ownTarget_sum (hμ : ∀ k ∈ options, 0 < μ k) (hne : options ≠ []) :
    sumOver options (ownTarget options μ n v) = 1 := by
  obtain ⟨i, hi⟩ := List.exists_mem_of_ne_nil options hne
  have hpos := ownTotal_pos (n := n) (v := v) hμ hi
  have : sumOver options (ownTarget options μ n v) =
      sumOver options (ownMass μ n v) * (sumOver options (ownMass μ n v))⁻¹ := by
    rw [← sumOver_mul_right]
    exact sumOver_congr fun k _ => by unfold ownTarget; grind
  grind

/-- Monotonicity at equal rounds: the more rejected of two options has the smaller ratio to its base weight. -/
theorem ownTarget_monotone (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) (hj : j ∈ options)
    (hn : n i = n j) (h : v i < v j) (hT : v i < n i) :
    ownTarget options μ n v j / μ j < ownTarget options μ n v i / μ i := by
  have hpos := ownTotal_pos (n := n) (v := v) hμ hi
  have hr : ratio (n j) (v j) < ratio (n i) (v i) := by
    rw [← hn]
    exact ratio_lt h hT
  have share : ∀ k ∈ options,
      ownTarget options μ n v k / μ k = ratio (n k) (v k) / sumOver options (ownMass μ n v) := by
    intro k hk
    have := hμ k hk
    unfold ownTarget
    generalize sumOver options (ownMass μ n v) = S at *
    unfold ownMass; grind
  rw [share i hi, share j hj]
  refine div_lt_div_of_mul_lt hpos hpos ?_
  rw [Rat.mul_comm, Rat.mul_comm _ (sumOver _ _)]
  exact mul_lt_mul_pos hpos hr

/-- Two options stand to each other as their own counts say, whatever else was up: `P i : P j = μ i r i : μ j r j`. -/
theorem ownTarget_odds :
    ownTarget options μ n v i * (μ j * ratio (n j) (v j)) = ownTarget options μ n v j * (μ i * ratio (n i) (v i)) := by
  unfold ownTarget
  generalize sumOver options (ownMass μ n v) = S
  unfold ownMass
  grind

/-- Where all options have the same rounds it is the published target. -/
theorem ownTarget_equal {T : Nat} (h : ∀ k, n k = T) : ownTarget options μ n v i = target options μ T v i := by
  have each : ∀ k, ownMass μ n v k = mass μ T v k * (weight T 0 : Rat)⁻¹ := by
    intro k
    unfold ownMass ratio mass
    rw [h k]
    grind
  have total : sumOver options (ownMass μ n v) = sumOver options (mass μ T v) * (weight T 0 : Rat)⁻¹ := by
    rw [← sumOver_mul_right]
    exact sumOver_congr fun k _ => each k
  have hw := weight_cast_pos T 0
  unfold ownTarget target
  rw [each i, total]
  clear each total
  generalize mass μ T v i = m
  generalize sumOver options (mass μ T v) = S
  generalize (weight T 0 : Rat) = w at *
  grind

end

end Buleyean
