module

/-!
What "N - 1 bits" means and what it does not.

A selection among N candidates rejects N - 1 of them. The selection and its N - 1 rejections are the same
event: each determines the other, and it has N outcomes, so either carries at most `log₂ N` bits. N - 1 bits
take `2 ^ (N - 1)` distinguishable outcomes: N - 1 *independent* verdicts have them; a selection, from N = 3 on,
does not.
-/

-- Nothing here is run, so nothing is compiled.
@[expose] public noncomputable section

namespace Buleyean

/-- The verdicts a selection gives: the winner is kept, every other candidate rejected. -/
def verdicts (N winner : Nat) : List Bool := (List.range N).map fun k => k != winner

theorem range_count_self {N w : Nat} (hw : w < N) : (List.range N).countP (fun k => k == w) = 1 := by
  induction N with
  | zero => omega
  | succ n ih =>
    rw [List.range_succ, List.countP_append]
    rcases Nat.lt_or_ge w n with h | h
    · simp [ih h, show ¬ n = w by omega]
    · have : List.countP (fun k => k == w) (List.range n) = 0 := by
        simp only [List.countP_eq_zero, List.mem_range, beq_iff_eq]; omega
      simp only [this, List.countP_singleton, show (n == w) = true by simp; omega, if_true]

/-- A selection rejects exactly N - 1 candidates. -/
theorem verdicts_count {N w : Nat} (hw : w < N) : (verdicts N w).count true = N - 1 := by
  have split := List.length_eq_countP_add_countP (fun k => k == w) (l := List.range N)
  rw [range_count_self hw, List.length_range] at split
  have rejected : (verdicts N w).count true =
      List.countP (fun k => decide ¬(k == w) = true) (List.range N) := by
    rw [verdicts, List.count_eq_countP, List.countP_map]
    refine List.countP_congr fun k _ => ?_
    by_cases h : k = w <;> simp [h]
  omega

/-- The rejections determine the selection: they say nothing that it did not. -/
theorem verdicts_injective {N w w' : Nat} (hw : w < N) (h : verdicts N w = verdicts N w') : w = w' := by
  have := congrArg (fun l => l[w]?) h
  simpa [verdicts, hw] using this

/-- All lists of `n` independent verdicts. -/
def independent : Nat → List (List Bool)
  | 0 => [[]]
  | n + 1 => (independent n).map (true :: ·) ++ (independent n).map (false :: ·)

/-- `n` independent verdicts have `2 ^ n` outcomes: `n` bits. -/
theorem independent_length (n : Nat) : (independent n).length = 2 ^ n := by
  induction n with
  | zero => rfl
  | succ n ih => simp [independent, ih]; omega

/-- They are the lists of length `n`, all of them. -/
theorem mem_independent {n : Nat} {l : List Bool} : l ∈ independent n ↔ l.length = n := by
  induction n generalizing l with
  | zero => simp [independent]
  | succ n ih =>
    cases l with
    | nil => simp [independent]
    | cons b l => cases b <;> simp [independent, ih]

/-- They are pairwise different, so `2 ^ n` counts outcomes. -/
theorem independent_nodup (n : Nat) : (independent n).Nodup := by
  induction n with
  | zero => simp [independent]
  | succ n ih =>
    refine List.nodup_append.mpr ⟨?_, ?_, ?_⟩
    · exact List.Pairwise.map _ (fun _ _ h => by simpa using h) ih
    · exact List.Pairwise.map _ (fun _ _ h => by simpa using h) ih
    · intro a ha b hb
      simp only [List.mem_map] at ha hb
      obtain ⟨x, _, rfl⟩ := ha
      obtain ⟨y, _, rfl⟩ := hb
      simp

/-- From three candidates on, the N outcomes of a selection are too few for N - 1 bits. -/
theorem selection_lt_bits {N : Nat} (hN : 3 ≤ N) : N < 2 ^ (N - 1) := by
  induction N with
  | zero => omega
  | succ n ih =>
    rcases Nat.lt_or_ge 2 n with h | h
    · have := ih h
      have pow : 2 ^ (n + 1 - 1) = 2 * 2 ^ (n - 1) := by
        rw [← Nat.pow_succ']; congr 1; omega
      omega
    · have : n = 2 := by omega
      subst this; decide

/-- Where the bits go missing: of any two candidates a selection rejects one, so it never keeps two. -/
theorem verdicts_keep_one {N w j k : Nat} (hj : j < N) (hk : k < N) (hne : j ≠ k) :
    (verdicts N w)[j]? = some true ∨ (verdicts N w)[k]? = some true := by
  simp [verdicts, hj, hk]
  omega

end Buleyean
