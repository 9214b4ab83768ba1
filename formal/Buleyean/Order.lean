module

public import Buleyean.Rejection

/-!
Where counts come from: a boundary counts rejections, so their order does not matter and merging adds.

For one set of options a rejection is an option. For text a rejection is a list of tokens, and every prefix
is a node of a trie with its own counts.
-/

-- Nothing here is run, so nothing is compiled.
@[expose] public noncomputable section

namespace Buleyean

variable {ι : Type} [DecidableEq ι] {options : List ι} {μ : ι → Rat} {T : Nat}

/-- The counts of a list of rejections. -/
def boundary (rejections : List ι) : ι → Nat := fun i => rejections.count i

/-- Appending one rejection to the record is `reject`. -/
theorem boundary_cons (i : ι) (rs : List ι) : boundary (i :: rs) = reject i (boundary rs) := by
  funext j
  by_cases h : j = i
  · simp [boundary, reject, h]
  · simp [boundary, reject, h, Ne.symm h]

/-- The same rejections in another order give the same counts. -/
theorem boundary_perm {rs rs' : List ι} (p : rs.Perm rs') : boundary rs = boundary rs' := by
  funext i
  exact p.count_eq i

/-- The same rejections in another order give the same distribution. -/
theorem target_order_independent {rs rs' : List ι} (p : rs.Perm rs') :
    target options μ T (boundary rs) = target options μ T (boundary rs') := by
  rw [boundary_perm p]

omit [DecidableEq ι] in
/-- The same options in another order give the same distribution. -/
theorem target_options_perm {options' : List ι} (p : options.Perm options') (v : ι → Nat) :
    target options μ T v = target options' μ T v := by
  funext i
  unfold target
  rw [sumOver_perm p]

/-- Merging two boundaries adds their counts. -/
theorem boundary_merge (rs rs' : List ι) (i : ι) :
    boundary (rs ++ rs') i = boundary rs i + boundary rs' i := by
  simp [boundary]

/-- Which of two merged boundaries comes first does not matter. -/
theorem target_merge_comm (rs rs' : List ι) :
    target options μ T (boundary (rs ++ rs')) = target options μ T (boundary (rs' ++ rs)) :=
  target_order_independent List.perm_append_comm

/-! ### Text: counts at the nodes of a trie -/

/-- The counts at a node: rejections that begin with the prefix and go on with token `i`. -/
def atNode (rs : List (List ι)) (pre : List ι) : ι → Nat :=
  fun i => rs.countP fun y => (pre ++ [i]).isPrefixOf y

/-- The published counts: rejections with token `i` at absolute position `n`, whatever stands before it. -/
def atPosition (rs : List (List ι)) (n : Nat) : ι → Nat := fun i => rs.countP fun y => y[n]? == some i

/-- At every node of the trie the order of the rejections does not matter. -/
theorem atNode_order_independent {rs rs' : List (List ι)} (p : rs.Perm rs') (pre : List ι) :
    target options μ T (atNode rs pre) = target options μ T (atNode rs' pre) := by
  have : atNode rs pre = atNode rs' pre := funext fun i => p.countP_eq _
  rw [this]

/-- The same with rounds of their own, those of all judged answers at the node: their order does not matter either. -/
theorem ownTarget_order_independent {js js' rs rs' : List (List ι)} {m k : Rat} (pj : js.Perm js')
    (pr : rs.Perm rs') (pre : List ι) :
    ownTarget options μ m k (atNode js pre) (atNode rs pre) =
      ownTarget options μ m k (atNode js' pre) (atNode rs' pre) := by
  have hj : atNode js pre = atNode js' pre := funext fun i => pj.countP_eq _
  have hr : atNode rs pre = atNode rs' pre := funext fun i => pr.countP_eq _
  rw [hj, hr]

/-- At every node of the trie merging two boundaries adds their counts. -/
theorem atNode_merge (rs rs' : List (List ι)) (pre : List ι) (i : ι) :
    atNode (rs ++ rs') pre i = atNode rs pre i + atNode rs' pre i := by
  simp [atNode]

/-- A node never counts more than its position does. -/
theorem atNode_le_atPosition (rs : List (List ι)) (pre : List ι) (i : ι) :
    atNode rs pre i ≤ atPosition rs pre.length i := by
  refine List.countP_mono_left fun y _ h => ?_
  obtain ⟨rest, rfl⟩ := List.isPrefixOf_iff_prefix.mp h
  simp

/-- Absolute positions condition on text that never occurred: of the rejections `0 1` and `2 3`, position 1
rejects token 3 after token 0, where no rejection has it. -/
theorem atPosition_ignores_prefix :
    atPosition [[0, 1], [2, 3]] 1 3 = 1 ∧ atNode [[0, 1], [2, 3]] [0] 3 = 0 := by
  decide

end Buleyean
