module

public import Buleyean.Published

/-!
Gibbs' inequality without logarithms; and so `published` is the minimiser of the published objective.

The way there: Bernoulli's inequality, then the arithmetic and geometric means, then Gibbs for a distribution
with a common denominator, which every rational distribution has.
-/

-- Nothing here is run, so nothing is compiled.
@[expose] public noncomputable section

namespace Buleyean

variable {ι : Type}

/-- The product of `f` over the options. -/
def prodOver : List ι → (ι → Rat) → Rat
  | [], _ => 1
  | i :: options, f => f i * prodOver options f

@[simp] theorem prodOver_nil (f : ι → Rat) : prodOver [] f = 1 := rfl

@[simp] theorem prodOver_cons (a : ι) (l : List ι) (f : ι → Rat) :
    prodOver (a :: l) f = f a * prodOver l f := rfl

theorem prodOver_nonneg {l : List ι} {f : ι → Rat} (h : ∀ i ∈ l, 0 ≤ f i) : 0 ≤ prodOver l f := by
  induction l with
  | nil => simp only [prodOver_nil]; exact Rat.le_of_lt zero_lt_one
  | cons a l ih => exact Rat.mul_nonneg (h a (by simp)) (ih fun i hi => h i (by simp [hi]))

theorem prodOver_pos {l : List ι} {f : ι → Rat} (h : ∀ i ∈ l, 0 < f i) : 0 < prodOver l f := by
  induction l with
  | nil => exact zero_lt_one
  | cons a l ih => exact Rat.mul_pos (h a (by simp)) (ih fun i hi => h i (by simp [hi]))

theorem prodOver_mul (l : List ι) (f g : ι → Rat) :
    prodOver l (fun i => f i * g i) = prodOver l f * prodOver l g := by
  induction l with
  | nil => simp [Rat.mul_one]
  | cons a l ih => simp only [prodOver_cons]; grind

theorem prodOver_congr {l : List ι} {f g : ι → Rat} (h : ∀ i ∈ l, f i = g i) :
    prodOver l f = prodOver l g := by
  induction l with
  | nil => simp
  | cons a l ih => simp [h a, ih fun i hi => h i (by simp [hi])]

theorem pow_nonneg {x : Rat} (h : 0 ≤ x) (n : Nat) : 0 ≤ x ^ n := by
  induction n with
  | zero => rw [Rat.pow_zero]; exact Rat.le_of_lt zero_lt_one
  | succ n ih => rw [Rat.pow_succ]; exact Rat.mul_nonneg ih h

theorem pow_pos {x : Rat} (h : 0 < x) (n : Nat) : 0 < x ^ n := by
  induction n with
  | zero => rw [Rat.pow_zero]; exact zero_lt_one
  | succ n ih => rw [Rat.pow_succ]; exact Rat.mul_pos ih h

theorem mul_pow (x y : Rat) (n : Nat) : (x * y) ^ n = x ^ n * y ^ n := by
  induction n with
  | zero => simp [Rat.pow_zero, Rat.mul_one]
  | succ n ih => rw [Rat.pow_succ, Rat.pow_succ, Rat.pow_succ, ih]; grind

/-- Bernoulli's inequality: the power `n + 1` lies above its tangent at `x`. -/
theorem bernoulli {x y : Rat} (hx : 0 ≤ x) (hy : 0 ≤ y) (n : Nat) :
    x ^ n * ((n + 1) * y - n * x) ≤ y ^ (n + 1) := by
  induction n with
  | zero => simp only [Rat.pow_zero, Rat.pow_succ]; grind
  | succ n ih =>
    have h₁ := mul_le_mul_nonneg hy ih
    have h₂ : 0 ≤ x ^ n * ((n + 1) * ((y - x) * (y - x))) := by
      refine Rat.mul_nonneg (pow_nonneg hx n) (Rat.mul_nonneg ?_ ?_)
      · have : (0 : Rat) ≤ n := by exact_mod_cast Nat.zero_le n
        grind
      · rcases Rat.le_total (a := x) (b := y) with h | h
        · exact Rat.mul_nonneg (by grind) (by grind)
        · have := Rat.mul_nonneg (a := x - y) (b := x - y) (by grind) (by grind)
          grind
    rw [Rat.pow_succ y (n + 1), Rat.pow_succ x n]
    push_cast
    grind

/-- The arithmetic mean bounds the geometric: `∏ x ≤ (∑ x / n) ^ n`. -/
theorem amgm {l : List ι} {f : ι → Rat} (h : ∀ i ∈ l, 0 ≤ f i) :
    prodOver l f ≤ (sumOver l f / l.length) ^ l.length := by
  induction l with
  | nil => simp only [prodOver_nil, List.length_nil, Rat.pow_zero]; exact Rat.le_refl
  | cons a l ih =>
    have hl : ∀ i ∈ l, 0 ≤ f i := fun i hi => h i (by simp [hi])
    have ha := h a (by simp)
    have ih := mul_le_mul_nonneg ha (ih hl)
    have hs := sumOver_nonneg hl
    have hn : (0 : Rat) < (l.length + 1 : Nat) := by exact_mod_cast Nat.succ_pos _
    have hy : 0 ≤ sumOver (a :: l) f / (l.length + 1 : Nat) := by
      have := sumOver_nonneg h
      have := Rat.mul_nonneg this (Rat.le_of_lt (Rat.inv_pos.mpr hn))
      grind
    rcases Nat.eq_zero_or_pos l.length with h0 | hpos
    · have : l = [] := List.eq_nil_of_length_eq_zero h0
      subst this
      simp only [prodOver_cons, prodOver_nil, sumOver_cons, sumOver_nil, List.length_cons, List.length_nil]
      rw [Rat.pow_succ, Rat.pow_zero]
      grind
    · have hl0 : (0 : Rat) < (l.length : Nat) := by exact_mod_cast hpos
      have hx : 0 ≤ sumOver l f / (l.length : Nat) := by
        have := Rat.mul_nonneg hs (Rat.le_of_lt (Rat.inv_pos.mpr hl0))
        grind
      have tangent := bernoulli hx hy l.length
      have collapse : ((l.length : Nat) + 1 : Rat) * (sumOver (a :: l) f / (l.length + 1 : Nat)) -
          (l.length : Nat) * (sumOver l f / (l.length : Nat)) = f a := by
        simp only [sumOver_cons]
        push_cast at hn ⊢
        grind
      rw [collapse] at tangent
      rw [prodOver_cons, List.length_cons]
      grind

/-! ### Gibbs: expand each option into as many copies as its numerator says -/

/-- Every option `i` written `n i` times. -/
def copies (l : List ι) (n : ι → Nat) : List ι := l.flatMap fun i => List.replicate (n i) i

theorem sumOver_append (l l' : List ι) (f : ι → Rat) : sumOver (l ++ l') f = sumOver l f + sumOver l' f := by
  induction l with
  | nil => simp only [List.nil_append, sumOver_nil]; grind
  | cons a l ih => simp only [List.cons_append, sumOver_cons]; grind

theorem prodOver_append (l l' : List ι) (f : ι → Rat) :
    prodOver (l ++ l') f = prodOver l f * prodOver l' f := by
  induction l with
  | nil => simp only [List.nil_append, prodOver_nil]; grind
  | cons a l ih => simp only [List.cons_append, prodOver_cons]; grind

theorem sumOver_replicate (m : Nat) (a : ι) (f : ι → Rat) : sumOver (List.replicate m a) f = m * f a := by
  induction m with
  | zero => simp [Rat.zero_mul]
  | succ m ih => rw [List.replicate_succ, sumOver_cons, ih]; push_cast; grind

theorem prodOver_replicate (m : Nat) (a : ι) (f : ι → Rat) : prodOver (List.replicate m a) f = f a ^ m := by
  induction m with
  | zero => simp [Rat.pow_zero]
  | succ m ih => rw [List.replicate_succ, prodOver_cons, ih, Rat.pow_succ, Rat.mul_comm]

theorem sumOver_copies (l : List ι) (n : ι → Nat) (f : ι → Rat) :
    sumOver (copies l n) f = sumOver l (fun i => n i * f i) := by
  induction l with
  | nil => rfl
  | cons a l ih =>
    rw [copies, List.flatMap_cons, sumOver_append, sumOver_replicate, sumOver_cons, ← ih]
    rfl

theorem prodOver_copies (l : List ι) (n : ι → Nat) (f : ι → Rat) :
    prodOver (copies l n) f = prodOver l (fun i => f i ^ n i) := by
  induction l with
  | nil => rfl
  | cons a l ih =>
    rw [copies, List.flatMap_cons, prodOver_append, prodOver_replicate, prodOver_cons, ← ih]
    rfl

theorem length_copies (l : List ι) (n : ι → Nat) :
    ((copies l n).length : Rat) = sumOver l (fun i => (n i : Rat)) := by
  induction l with
  | nil => rfl
  | cons a l ih =>
    rw [copies, List.flatMap_cons, List.length_append, List.length_replicate, sumOver_cons, ← ih]
    push_cast
    rfl

theorem pow_le_one {x : Rat} (h : 0 ≤ x) (h₁ : x ≤ 1) (n : Nat) : x ^ n ≤ 1 := by
  induction n with
  | zero => rw [Rat.pow_zero]; exact Rat.le_refl
  | succ n ih =>
    have := mul_le_mul_nonneg (pow_nonneg h n) h₁
    rw [Rat.pow_succ]
    grind

section
variable {l : List ι} {q π : ι → Rat} {n : ι → Nat} {N : Nat}

/-- Gibbs' inequality: no distribution gives data of frequencies `q = n / N` a greater likelihood than `q`. -/
theorem gibbs (hN : 0 < N) (hq : ∀ i ∈ l, q i * N = n i) (hsum : sumOver l q = 1) (hπ : ∀ i ∈ l, 0 ≤ π i)
    (hπsum : sumOver l π = 1) : prodOver l (fun i => π i ^ n i) ≤ prodOver l (fun i => q i ^ n i) := by
  have hN' : (0 : Rat) < N := by exact_mod_cast hN
  have hq0 : ∀ i ∈ l, 0 ≤ q i := fun i hi => by
    have h : (0 : Rat) ≤ n i := by exact_mod_cast Nat.zero_le _
    rw [← hq i hi] at h
    refine Rat.not_lt.mp fun neg => ?_
    have := mul_lt_mul_pos hN' neg
    grind
  have hlen : ((copies l n).length : Rat) = N := by
    rw [length_copies, ← sumOver_congr hq, sumOver_mul_right, hsum, Rat.one_mul]
  have hx : ∀ i ∈ l, 0 ≤ π i * (q i)⁻¹ := fun i hi => by
    refine Rat.mul_nonneg (hπ i hi) ?_
    by_cases h : q i = 0
    · rw [h, Rat.inv_zero]; exact Rat.le_refl
    · have := hq0 i hi
      exact Rat.le_of_lt (Rat.inv_pos.mpr (by grind))
  have hxc : ∀ i ∈ copies l n, 0 ≤ π i * (q i)⁻¹ := fun i hi => by
    obtain ⟨a, ha, hm⟩ := List.mem_flatMap.mp hi
    exact (List.mem_replicate.mp hm).2 ▸ hx a ha
  have hmean : sumOver (copies l n) (fun i => π i * (q i)⁻¹) ≤ N := by
    have h₁ : sumOver l (fun i => n i * (π i * (q i)⁻¹)) ≤ sumOver l (fun i => π i * N) := by
      refine sumOver_le fun i hi => ?_
      have := hq i hi
      have := Rat.mul_nonneg (hπ i hi) (Rat.le_of_lt hN')
      by_cases h : q i = 0
      · rw [h, Rat.inv_zero]; grind
      · rw [show (n i : Rat) * (π i * (q i)⁻¹) = π i * N by grind]; exact Rat.le_refl
    rw [sumOver_copies]
    rw [sumOver_mul_right, hπsum, Rat.one_mul] at h₁
    exact h₁
  have hratio : prodOver l (fun i => (π i * (q i)⁻¹) ^ n i) ≤ 1 := by
    rw [← prodOver_copies]
    refine Rat.le_trans (amgm hxc) (pow_le_one ?_ ?_ _)
    · have := Rat.mul_nonneg (sumOver_nonneg hxc) (Rat.le_of_lt (Rat.inv_pos.mpr hN'))
      rw [hlen]; grind
    · have := mul_le_mul_nonneg (Rat.le_of_lt (Rat.inv_pos.mpr hN')) hmean
      rw [hlen]; grind
  have hsplit : prodOver l (fun i => π i ^ n i) =
      prodOver l (fun i => q i ^ n i) * prodOver l (fun i => (π i * (q i)⁻¹) ^ n i) := by
    rw [← prodOver_mul]
    refine prodOver_congr fun i hi => ?_
    by_cases h : q i = 0
    · have : n i = 0 := by
        have := hq i hi
        rw [h, Rat.zero_mul] at this
        exact_mod_cast this.symm
      rw [this]; simp only [Rat.pow_zero]; grind
    · rw [← mul_pow, show q i * (π i * (q i)⁻¹) = π i by grind]
  have := mul_le_mul_nonneg (prodOver_nonneg fun i hi => pow_nonneg (hq0 i hi) (n i)) hratio
  rw [hsplit]
  grind

theorem prodOver_le {f g : ι → Rat} (h : ∀ i ∈ l, 0 ≤ f i ∧ f i ≤ g i) : prodOver l f ≤ prodOver l g := by
  induction l with
  | nil => exact Rat.le_refl
  | cons a l ih =>
    have ⟨hf, hfg⟩ := h a (by simp)
    have hl : ∀ i ∈ l, 0 ≤ f i ∧ f i ≤ g i := fun i hi => h i (by simp [hi])
    have h₁ := mul_le_mul_nonneg hf (ih hl)
    have h₂ := mul_le_mul_nonneg (prodOver_nonneg fun i hi => Rat.le_trans (hl i hi).1 (hl i hi).2) hfg
    simp only [prodOver_cons]
    grind

theorem prodOver_lt {f g : ι → Rat} (h : ∀ i ∈ l, 0 ≤ f i ∧ f i ≤ g i) (hg : ∀ i ∈ l, 0 < g i) {j : ι}
    (hj : j ∈ l)
    (hlt : f j < g j) : prodOver l f < prodOver l g := by
  induction l with
  | nil => simp at hj
  | cons a l ih =>
    have ⟨hf, hfg⟩ := h a (by simp)
    have hl : ∀ i ∈ l, 0 ≤ f i ∧ f i ≤ g i := fun i hi => h i (by simp [hi])
    have hgl : ∀ i ∈ l, 0 < g i := fun i hi => hg i (by simp [hi])
    have ha := hg a (by simp)
    simp only [prodOver_cons]
    rcases List.mem_cons.mp hj with rfl | hj
    · have h₁ := mul_le_mul_nonneg hf (prodOver_le hl)
      have h₂ := mul_lt_mul_pos (prodOver_pos hgl) hlt
      grind
    · have h₁ := mul_lt_mul_pos ha (ih hl hgl hj)
      have h₂ := mul_le_mul_nonneg (prodOver_nonneg fun i hi => (hl i hi).1) hfg
      grind

theorem pow_le_pow {x y : Rat} (hx : 0 ≤ x) (h : x ≤ y) (m : Nat) : x ^ m ≤ y ^ m := by
  induction m with
  | zero => rw [Rat.pow_zero, Rat.pow_zero]; exact Rat.le_refl
  | succ m ih =>
    have h₁ := mul_le_mul_nonneg hx ih
    have h₂ := mul_le_mul_nonneg (pow_nonneg (Rat.le_trans hx h) m) h
    rw [Rat.pow_succ, Rat.pow_succ]
    grind

theorem pow_lt_pow {x y : Rat} (hx : 0 ≤ x) (h : x < y) {m : Nat} (hm : 0 < m) : x ^ m < y ^ m := by
  obtain ⟨k, rfl⟩ : ∃ k, m = k + 1 := ⟨m - 1, by omega⟩
  have h₁ := mul_le_mul_nonneg hx (pow_le_pow hx (Rat.le_of_lt h) k)
  have h₂ := mul_lt_mul_pos (pow_pos (x := y) (by grind) k) h
  rw [Rat.pow_succ, Rat.pow_succ]
  grind

/-- Gibbs, strictly: where `q` is positive everywhere, any other distribution does worse. If it did as well,
the midpoint of the two would do better than `q`. -/
theorem gibbs_strict (hN : 0 < N) (hq : ∀ i ∈ l, q i * N = n i) (hpos : ∀ i ∈ l, 0 < q i)
    (hsum : sumOver l q = 1)
    (hπ : ∀ i ∈ l, 0 ≤ π i) (hπsum : sumOver l π = 1) {j : ι} (hj : j ∈ l) (hne : π j ≠ q j) :
    prodOver l (fun i => π i ^ n i) < prodOver l (fun i => q i ^ n i) := by
  have hN' : (0 : Rat) < N := by exact_mod_cast hN
  have hle := gibbs hN hq hsum hπ hπsum
  refine Rat.not_le.mp fun hge => ?_
  have heq := Rat.le_antisymm hle hge
  let m : ι → Rat := fun i => (π i + q i) * 2⁻¹
  have hm : ∀ i ∈ l, 0 < m i := fun i hi => by
    have := hpos i hi
    have := hπ i hi
    simp only [m]; grind
  have hmsum : sumOver l m = 1 := by
    simp only [m]
    rw [sumOver_mul_right, sumOver_add, hsum, hπsum]
    grind
  have hmle := gibbs hN hq hsum (fun i hi => Rat.le_of_lt (hm i hi)) hmsum
  have square : ∀ i, m i * m i - π i * q i = ((π i - q i) * 2⁻¹) * ((π i - q i) * 2⁻¹) := fun i => by
    simp only [m]; grind
  have sq_nonneg : ∀ x : Rat, 0 ≤ x * x := fun x => by
    rcases Rat.le_total (a := 0) (b := x) with h | h
    · exact Rat.mul_nonneg h h
    · have := Rat.mul_nonneg (a := -x) (b := -x) (by grind) (by grind)
      grind
  have hpq : ∀ i ∈ l, 0 ≤ π i * q i := fun i hi => Rat.mul_nonneg (hπ i hi) (Rat.le_of_lt (hpos i hi))
  have key : prodOver l (fun i => (π i * q i) ^ n i) < prodOver l (fun i => (m i * m i) ^ n i) := by
    refine prodOver_lt (fun i hi => ⟨pow_nonneg (hpq i hi) _, pow_le_pow (hpq i hi) ?_ _⟩)
      (fun i hi => pow_pos (Rat.mul_pos (hm i hi) (hm i hi)) _) hj (pow_lt_pow (hpq j hj) ?_ ?_)
    · have := square i
      have := sq_nonneg ((π i - q i) * 2⁻¹)
      grind
    · have := square j
      have := sq_nonneg ((π j - q j) * 2⁻¹)
      have : (π j - q j) * 2⁻¹ * ((π j - q j) * 2⁻¹) ≠ 0 := by grind
      grind
    · have h : (0 : Rat) < n j := by rw [← hq j hj]; exact Rat.mul_pos (hpos j hj) hN'
      exact_mod_cast h
  simp only [mul_pow] at key
  rw [prodOver_mul, prodOver_mul, heq] at key
  have hQ := prodOver_pos (l := l) (f := fun i => q i ^ n i) fun i hi => pow_pos (hpos i hi) _
  have hM := prodOver_pos (l := l) (f := fun i => m i ^ n i) fun i hi => pow_pos (hm i hi) _
  have h₁ := mul_le_mul_nonneg (Rat.le_of_lt hM) hmle
  have h₂ := mul_le_mul_nonneg (Rat.le_of_lt hQ) hmle
  grind

end

/-! ### The minimiser of the published objective -/

/-- Every nonnegative rational function on the options has a common denominator. -/
theorem common_denominator (l : List ι) (q : ι → Rat) (hq : ∀ i ∈ l, 0 ≤ q i) :
    ∃ N : Nat, 0 < N ∧ ∀ i ∈ l, ∃ n : Nat, q i * N = n := by
  induction l with
  | nil => exact ⟨1, by decide, by simp⟩
  | cons a l ih =>
    obtain ⟨N, hN, h⟩ := ih fun i hi => hq i (by simp [hi])
    have ha := hq a (by simp)
    refine ⟨N * (q a).den, Nat.mul_pos hN (q a).den_pos, fun i hi => ?_⟩
    rcases List.mem_cons.mp hi with rfl | hi
    · obtain ⟨k, hk⟩ := Int.eq_ofNat_of_zero_le (Rat.num_nonneg.mpr ha)
      have hden : q i = ((q i).num : Rat) / ((q i).den : Rat) := by
        have := Rat.divInt_eq_div (q i).num (q i).den
        rwa [Rat.num_divInt_den, Rat.intCast_natCast] at this
      have hpos : (0 : Rat) < (q i).den := by exact_mod_cast (q i).den_pos
      refine ⟨k * N, ?_⟩
      push_cast
      rw [hk] at hden
      generalize ((q i).den : Rat) = d at *
      rw [hden]
      push_cast
      grind
    · obtain ⟨n, hn⟩ := h i hi
      refine ⟨n * (q a).den, ?_⟩
      push_cast
      rw [← hn]
      grind

/-- `published` is the one minimiser of the published objective: with its numerators `n` over a common
denominator, every other distribution makes the product `∏ i, π i ^ n i`, and so the loss, strictly worse. -/
theorem published_minimiser {options : List ι} {μ : ι → Rat} {T : Nat} {v : ι → Nat} {α : Rat}
    (hμ : ∀ k ∈ options, 0 < μ k) (hne : options ≠ []) (hT : 0 < T)
    (hv : sumOver options (fun k => (v k : Rat)) = T) (hα : 0 < α) (hα' : α < 1) :
    ∃ (N : Nat) (n : ι → Nat), 0 < N ∧ (∀ i ∈ options, published options μ T v α i * N = n i) ∧
      ∀ π : ι → Rat, (∀ i ∈ options, 0 ≤ π i) → sumOver options π = 1 →
        (∃ j ∈ options, π j ≠ published options μ T v α j) →
        prodOver options (fun i => π i ^ n i) <
          prodOver options (fun i => published options μ T v α i ^ n i) := by
  have hT' : (0 : Rat) < T := by exact_mod_cast hT
  have hpos : ∀ i ∈ options, 0 < published options μ T v α i := fun i hi => by
    have h₁ := Rat.mul_pos hα (target_pos (T := T) (v := v) hμ hi)
    have h₂ : (0 : Rat) ≤ v i := by exact_mod_cast Nat.zero_le _
    have h₃ := Rat.mul_nonneg (a := 1 - α) (by grind) (Rat.mul_nonneg h₂ (Rat.le_of_lt (Rat.inv_pos.mpr hT')))
    unfold published
    grind
  obtain ⟨N, hN, h⟩ := common_denominator options _ fun i hi => Rat.le_of_lt (hpos i hi)
  classical
  let n : ι → Nat := fun i => if h : ∃ m : Nat, published options μ T v α i * N = m then h.choose else 0
  have hn : ∀ i ∈ options, published options μ T v α i * N = n i := fun i hi => by
    simp only [n, dif_pos (h i hi)]
    exact (h i hi).choose_spec
  refine ⟨N, n, hN, hn, fun π hπ hπsum ⟨j, hj, hne'⟩ => ?_⟩
  exact gibbs_strict hN hn hpos (published_sum hμ hne hT hv) hπ hπsum hj hne'

end Buleyean
