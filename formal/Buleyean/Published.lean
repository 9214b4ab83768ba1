module

public import Buleyean.Rejection

/-!
The published objective, `α KL(P ‖ π) - (1 - α) ∑ i, (v i / T) log (π i)`, is the cross-entropy of `π` against

    q i = α P i + (1 - α) v i / T

up to a constant. When the counts sum to `T`, `q` is a distribution, and by Gibbs' inequality the minimiser
(`Gibbs.lean`). Gibbs is stated without logarithms: for a common denominator `N`, `q i = n i / N`, the
cross-entropy is `-1/N` times the logarithm of `∏ i, π i ^ n i`, so the loss is least where this is greatest.
-/

-- Nothing here is run, so nothing is compiled.
@[expose] public noncomputable section

namespace Buleyean

variable {ι : Type} {options : List ι} {μ : ι → Rat} {T : Nat} {v : ι → Nat} {i j : ι} {α : Rat}

/-- What the published objective pulls towards. -/
def published (options : List ι) (μ : ι → Rat) (T : Nat) (v : ι → Nat) (α : Rat) (i : ι) : Rat :=
  α * target options μ T v i + (1 - α) * ((v i : Rat) / T)

/-- When the counts sum to the rounds, `published` is a distribution. -/
theorem published_sum (hμ : ∀ k ∈ options, 0 < μ k) (hne : options ≠ []) (hT : 0 < T)
    (hv : sumOver options (fun k => (v k : Rat)) = T) : sumOver options (published options μ T v α) = 1 := by
  have hT' : (0 : Rat) < T := by exact_mod_cast hT
  have h₁ := target_sum (T := T) (v := v) hμ hne
  have h₂ : sumOver options (published options μ T v α) =
      sumOver options (target options μ T v) * α +
        sumOver options (fun k => (v k : Rat)) * ((1 - α) * (T : Rat)⁻¹) := by
    rw [← sumOver_mul_right, ← sumOver_mul_right, ← sumOver_add]
    exact sumOver_congr fun k _ => by simp only [published]; grind
  rw [h₂, h₁, hv]
  grind

/-- The published objective pulls an option above its complement target exactly when its rate of rejection is
above that target: rejection is rewarded. -/
theorem published_rewards_iff (hα : α < 1) :
    target options μ T v i < published options μ T v α i ↔ target options μ T v i < (v i : Rat) / T := by
  unfold published
  generalize target options μ T v i = p
  generalize (v i : Rat) / T = r
  have hα' : 0 < 1 - α := by grind
  constructor
  · intro h
    refine (Rat.mul_lt_mul_left hα').mp ?_
    grind
  · intro h
    have := mul_lt_mul_pos hα' h
    grind

/-- The target of an option is below 1 as soon as there is another. -/
theorem target_lt_one [DecidableEq ι] (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options) (hj : j ∈ options)
    (hne : j ≠ i) : target options μ T v i < 1 := by
  have hS := total_pos (T := T) (v := v) hμ hi
  have hj' := mass_pos (T := T) (v := v) (hμ j hj)
  have hi' := mass_pos (T := T) (v := v) (hμ i hi)
  have single := le_sumOver (l := options) (f := fun k => if k = i then mass μ T v k else 0)
    (fun k hk => by
      have := mass_pos (T := T) (v := v) (hμ k hk)
      grind) hi
  have strict := sumOver_lt (l := options) (f := fun k => if k = i then mass μ T v k else 0) (g := mass μ T v)
    (fun k hk => by
      have := mass_pos (T := T) (v := v) (hμ k hk)
      grind) hj (by grind)
  unfold target
  rw [Rat.div_lt_iff hS]
  grind

/-- An option rejected in every round is rewarded, whatever the base measure and the other counts. -/
theorem published_rewards_rejected [DecidableEq ι] (hμ : ∀ k ∈ options, 0 < μ k) (hi : i ∈ options)
    (hj : j ∈ options) (hne : j ≠ i) (hT : 0 < T) (hv : v i = T) (hα : α < 1) :
    target options μ T v i < published options μ T v α i := by
  have hT' : (0 : Rat) < T := by exact_mod_cast hT
  rw [published_rewards_iff hα, hv, show (T : Rat) / T = 1 by grind]
  exact target_lt_one hμ hi hj hne

/-! ### One rejected token of a vocabulary of `V`, `v = T = 1` -/

/-- The counts of a single rejection of token `y`. -/
def once (y : Nat) : Nat → Nat := reject y fun _ => 0

theorem sumOver_range_succ (n : Nat) (f : Nat → Rat) :
    sumOver (List.range (n + 1)) f = sumOver (List.range n) f + f n := by
  rw [List.range_succ, sumOver_perm List.perm_append_comm, List.cons_append, List.nil_append, sumOver_cons]
  grind

theorem sumOver_once (n y : Nat) (a b : Rat) :
    sumOver (List.range n) (fun k => if k = y then a else b) =
      (n : Rat) * b + if y < n then a - b else 0 := by
  induction n with
  | zero => simp [Rat.zero_mul, Rat.add_zero]
  | succ n ih =>
    rw [sumOver_range_succ, ih]
    push_cast
    grind

/-- One rejection in one round: the counts sum to the rounds, so `published_minimiser` speaks of this case. -/
theorem once_sum {V y : Nat} (hy : y < V) : sumOver (List.range V) (fun k => (once y k : Rat)) = (1 : Nat) := by
  have : ∀ k ∈ List.range V, (once y k : Rat) = if k = y then 1 else 0 := fun k _ => by
    by_cases h : k = y <;> simp [once, reject, h]
  rw [sumOver_congr this, sumOver_once]
  grind

theorem mass_once (y k : Nat) : mass (fun _ => 1) 1 (once y) k = if k = y then 1 else 2 := by
  by_cases h : k = y <;> simp [mass, once, reject, weight, h] <;> rfl

/-- The complement target of the rejected token is `1 / (2V - 1)`. -/
theorem target_once {V y : Nat} (hy : y < V) :
    target (List.range V) (fun _ => 1) 1 (once y) y = 1 / (2 * V - 1) := by
  have : sumOver (List.range V) (mass (fun _ => 1) 1 (once y)) = 2 * V - 1 := by
    rw [sumOver_congr fun k _ => mass_once y k, sumOver_once]
    grind
  unfold target
  rw [this, mass_once]
  simp

/-- The published minimiser gives it `1 - α + α / (2V - 1)`: at `α = 0.7` never less than 0.3. -/
theorem published_once {V y : Nat} (hy : y < V) :
    published (List.range V) (fun _ => 1) 1 (once y) α y = (1 - α) + α / (2 * V - 1) := by
  unfold published
  rw [target_once hy]
  simp [once, reject]
  grind

/-- The published contrast rewards the rejected token: strictly more than its complement target, for every
vocabulary of two or more and every `α < 1`. -/
theorem published_rewards_once {V y : Nat} (hV : 2 ≤ V) (hy : y < V) (hα : α < 1) :
    target (List.range V) (fun _ => 1) 1 (once y) y <
      published (List.range V) (fun _ => 1) 1 (once y) α y := by
  have : ∃ z, z < V ∧ z ≠ y := ⟨if y = 0 then 1 else 0, by split <;> omega, by split <;> omega⟩
  obtain ⟨z, hz, hne⟩ := this
  exact published_rewards_rejected (j := z) (fun _ _ => zero_lt_one) (by simp [hy]) (by simp [hz]) hne
    (by decide) (by simp [once, reject]) hα

end Buleyean
