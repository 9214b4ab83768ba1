module

public import Buleyean.Complement

/-!
The base measure is a reference model `ρ`: positive, summing to 1. Which options does the target lower?

At `π = ρ` the gradient of `KL(P ‖ π)` in the logits is `ρ - P` (calculus, not proved here), so a descent step
lowers the logit of `i` exactly when `P i < ρ i`.
-/

@[expose] public section

namespace Buleyean

variable {ι : Type} {options : List ι} {ρ : ι → Rat} {T : Nat} {v : ι → Nat} {i j : ι}

/-- Below its reference, exactly the options whose weight is below the reference mean of the weights. -/
theorem reference_below_iff (hρ : ∀ k ∈ options, 0 < ρ k) (hi : i ∈ options) :
    target options ρ T v i < ρ i ↔ (weight T (v i) : Rat) < sumOver options (mass ρ T v) := by
  have hi' := hρ i hi
  unfold target
  rw [Rat.div_lt_iff (total_pos hρ hi)]
  exact Rat.mul_lt_mul_left hi'

/-- Above its reference, exactly the options whose weight is above the reference mean of the weights. -/
theorem reference_above_iff (hρ : ∀ k ∈ options, 0 < ρ k) (hi : i ∈ options) :
    ρ i < target options ρ T v i ↔ sumOver options (mass ρ T v) < (weight T (v i) : Rat) := by
  have hi' := hρ i hi
  unfold target
  rw [Rat.lt_div_iff (total_pos hρ hi)]
  exact Rat.mul_lt_mul_left hi'

/-- The reference mean of a constant is the constant. -/
theorem reference_mean_const (hsum : sumOver options ρ = 1) (c : Rat) :
    sumOver options (fun k => ρ k * c) = c := by
  rw [sumOver_mul_right, hsum, Rat.one_mul]

/-- The most rejected option is strictly below its reference, unless every option is equally rejected. -/
theorem reference_most_rejected_below (hρ : ∀ k ∈ options, 0 < ρ k) (hsum : sumOver options ρ = 1)
    (hi : i ∈ options) (hmax : ∀ k ∈ options, v k ≤ v i) (hj : j ∈ options) (hlt : v j < v i) (hT : v j < T) :
    target options ρ T v i < ρ i := by
  rw [reference_below_iff hρ hi]
  have mean := reference_mean_const hsum (weight T (v i) : Rat)
  have := sumOver_lt (l := options) (f := fun k => ρ k * weight T (v i)) (g := mass ρ T v)
    (fun k hk => mul_le_mul_nonneg (Rat.le_of_lt (hρ k hk)) (by exact_mod_cast weight_le (hmax k hk)))
    hj (mul_lt_mul_pos (hρ j hj) (by exact_mod_cast weight_lt hlt hT))
  grind

/-- If all rejected options are rejected equally often, each of them is strictly below its reference, as long
as one option is not rejected. One rejected token is the usual case. -/
theorem reference_rejected_below {c : Nat} (hρ : ∀ k ∈ options, 0 < ρ k) (hsum : sumOver options ρ = 1)
    (hv : ∀ k ∈ options, v k = 0 ∨ v k = c) (hi : i ∈ options) (hvi : 0 < v i) (hj : j ∈ options)
    (hvj : v j = 0)
    (hT : 0 < T) : target options ρ T v i < ρ i := by
  refine reference_most_rejected_below hρ hsum hi (fun k hk => ?_) hj (by omega) (by omega)
  have := hv k hk
  have := hv i hi
  omega

/-- An option never rejected is strictly above its reference as soon as any option is rejected. -/
theorem reference_unrejected_above (hρ : ∀ k ∈ options, 0 < ρ k) (hsum : sumOver options ρ = 1)
    (hi : i ∈ options) (hvi : v i = 0) (hj : j ∈ options) (hvj : 0 < v j) (hT : 0 < T) :
    ρ i < target options ρ T v i := by
  rw [reference_above_iff hρ hi]
  have mean := reference_mean_const hsum (weight T (v i) : Rat)
  have := sumOver_lt (l := options) (f := mass ρ T v) (g := fun k => ρ k * weight T (v i))
    (fun k hk => mul_le_mul_nonneg (Rat.le_of_lt (hρ k hk))
      (by exact_mod_cast weight_le (show v i ≤ v k by omega)))
    hj (mul_lt_mul_pos (hρ j hj) (by exact_mod_cast weight_lt (show v i < v j by omega) (by omega)))
  grind

/-- If every option is equally rejected (or none is), the target is the reference itself. -/
theorem reference_fixed (hsum : sumOver options ρ = 1) (hi : i ∈ options) {c : Nat}
    (hv : ∀ k ∈ options, v k = c) : target options ρ T v i = ρ i := by
  have mean : sumOver options (mass ρ T v) = weight T c := by
    rw [← reference_mean_const hsum (weight T c : Rat)]
    exact sumOver_congr fun k hk => by simp [mass, hv k hk]
  have := weight_cast_pos T c
  unfold target
  rw [mean]
  simp only [mass, hv i hi]
  grind

/-- The KL gradient at the reference, `ρ i - P i`, is positive on a most rejected option: down it goes. -/
theorem reference_gradient_away (hρ : ∀ k ∈ options, 0 < ρ k) (hsum : sumOver options ρ = 1)
    (hi : i ∈ options) (hmax : ∀ k ∈ options, v k ≤ v i) (hj : j ∈ options) (hlt : v j < v i) (hT : v j < T) :
    0 < ρ i - target options ρ T v i := by
  have := reference_most_rejected_below hρ hsum hi hmax hj hlt hT
  grind

/-- "Most rejected" cannot be dropped: with counts 1, 10, 0 of 10 rounds and equal references, the option
rejected once is *above* its reference, because another was rejected far more often. -/
theorem reference_rejected_may_rise :
    let v : Nat → Nat := fun k => [1, 10, 0].getD k 0
    let ρ : Nat → Rat := fun _ => 1 / 3
    sumOver [0, 1, 2] ρ = 1 ∧ target [0, 1, 2] ρ 10 v 0 = 5 / 11 ∧ ρ 0 < target [0, 1, 2] ρ 10 v 0 := by
  simp [target, mass, weight]
  grind

/-- The closed form the sparse code uses: with `r k = w k / (T + 1)`, which is 1 off the rejected tokens,
`P i = ρ i * r i / (1 - ∑ k, ρ k * (1 - r k))`. -/
theorem reference_closed_form (hρ : ∀ k ∈ options, 0 < ρ k) (hsum : sumOver options ρ = 1)
    (hi : i ∈ options) :
    let r : ι → Rat := fun k => weight T (v k) / (T + 1 : Nat)
    target options ρ T v i = ρ i * r i / (1 - sumOver options (fun k => ρ k * (1 - r k))) := by
  intro r
  have hT : (0 : Rat) < (T + 1 : Nat) := by exact_mod_cast Nat.succ_pos T
  have hS := total_pos (T := T) (v := v) hρ hi
  have split : sumOver options ρ = sumOver options (fun k => ρ k * (1 - r k)) +
      sumOver options (mass ρ T v) * ((T + 1 : Nat) : Rat)⁻¹ := by
    rw [← sumOver_mul_right, ← sumOver_add]
    exact sumOver_congr fun k _ => by simp only [r, mass]; grind
  have hZ : 1 - sumOver options (fun k => ρ k * (1 - r k)) =
      sumOver options (mass ρ T v) * ((T + 1 : Nat) : Rat)⁻¹ := by grind
  rw [hZ]
  simp only [r, target, mass]
  grind

end Buleyean
