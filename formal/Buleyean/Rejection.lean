module

public import Buleyean.Complement

/-! One more rejection: what it lowers, what it raises, and when it changes nothing. -/

@[expose] public section

namespace Buleyean

variable {ι : Type} [DecidableEq ι] {options : List ι} {μ : ι → Rat} {T : Nat} {v : ι → Nat} {i j : ι}

/-- The counts after one more rejection of `i`. -/
def reject (i : ι) (v : ι → Nat) : ι → Nat := fun j => if j = i then v j + 1 else v j

theorem mass_reject_other (h : j ≠ i) : mass μ T (reject i v) j = mass μ T v j := by simp [mass, reject, h]

theorem mass_reject_self (hμ : 0 < μ i) (hT : v i < T) : mass μ T (reject i v) i < mass μ T v i := by
  have : weight T (v i + 1) < weight T (v i) := weight_lt (by omega) hT
  simp only [mass, reject, if_true]
  exact mul_lt_mul_pos hμ (by exact_mod_cast this)

/-- One more rejection of `i` strictly lowers its probability (with some other option to go to). -/
theorem reject_lowers (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) (hj : j ∈ options) (hne : j ≠ i)
    (hT : v i < T) : target options μ T (reject i v) i < target options μ T v i := by
  have less := mass_reject_self (hμ i hi) hT
  have pos : ∀ k ∈ options, 0 < mass μ T v k := fun k hk => mass_pos (hμ k hk)
  unfold target
  refine div_lt_div_of_mul_lt (total_pos hμ hi) (total_pos hμ hi) ?_
  rw [Rat.mul_comm, Rat.mul_comm (mass μ T v i), ← sumOver_mul_right, ← sumOver_mul_right]
  refine sumOver_lt (fun k hk => ?_) hj ?_
  · rcases Decidable.em (k = i) with rfl | h
    · rw [Rat.mul_comm]; exact Rat.le_refl
    · rw [mass_reject_other h]
      exact Rat.le_of_lt (mul_lt_mul_pos (pos k hk) less)
  · rw [mass_reject_other hne]
    exact mul_lt_mul_pos (pos j hj) less

/-- One more rejection of `i` strictly raises the probability of every other option. -/
theorem reject_raises (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) (hj : j ∈ options) (hne : j ≠ i)
    (hT : v i < T) : target options μ T v j < target options μ T (reject i v) j := by
  have less := mass_reject_self (hμ i hi) hT
  unfold target
  rw [mass_reject_other hne]
  refine div_lt_div_of_mul_lt (total_pos hμ hi) (total_pos hμ hi) (mul_lt_mul_pos (mass_pos (hμ j hj)) ?_)
  refine sumOver_lt (fun k _ => ?_) hi less
  rcases Decidable.em (k = i) with rfl | h
  · exact Rat.le_of_lt less
  · rw [mass_reject_other h]; exact Rat.le_refl

/-- `reject_lowers` under the uniform base measure. -/
theorem reject_lowers_uniform (hi : i ∈ options) (hj : j ∈ options) (hne : j ≠ i) (hT : v i < T) :
    target options (fun _ => 1) T (reject i v) i < target options (fun _ => 1) T v i :=
  reject_lowers (fun _ _ => zero_lt_one) hi hj hne hT

/-- `reject_raises` under the uniform base measure. -/
theorem reject_raises_uniform (hi : i ∈ options) (hj : j ∈ options) (hne : j ≠ i) (hT : v i < T) :
    target options (fun _ => 1) T v j < target options (fun _ => 1) T (reject i v) j :=
  reject_raises (fun _ _ => zero_lt_one) hi hj hne hT

/-- At the clip another rejection changes nothing. -/
theorem reject_saturated (hT : T ≤ v i) : target options μ T (reject i v) j = target options μ T v j := by
  have : mass μ T (reject i v) = mass μ T v := by
    funext k
    rcases Decidable.em (k = i) with rfl | h
    · have : weight T (v k + 1) = weight T (v k) := by unfold weight; omega
      simp [mass, reject, this]
    · exact mass_reject_other h
  unfold target
  rw [this]

end Buleyean
