module

public import Buleyean.Complement

/-!
Where the mass that rejections take goes. By `ownTarget` it goes to all options in proportion. Here it goes to the options
of a set `S`, those that were up and those that are plausible once the rejected ones are gone; the others, the tail, keep
their base weight. This is `src/buleyean_rl/objectives/complement.py::exact_target` with its `min_p`, here `p`:

    S = {j : n j > 0 or μ j ≥ p * max μ i over r i ≥ 1}        Z = ∑ S, μ i * r i / ∑ S, μ i
    P i = μ i * r i / Z in S, μ i outside

`r` is any positive ratio, so a power of `ratio` and a capped one too. `μ` sums to 1.
-/

-- `prove.py` compiles it with `Complement.lean` where it is run.
@[expose] public noncomputable section

namespace Buleyean

variable {ι : Type}

/-- `f` in `S`, 0 outside. -/
def restrict (S : ι → Bool) (f : ι → Rat) (i : ι) : Rat := if S i then f i else 0

/-- `Z`, the mean ratio in `S`. -/
def meanRatio (options : List ι) (μ r : ι → Rat) (S : ι → Bool) : Rat :=
  sumOver options (restrict S fun i => μ i * r i) / sumOver options (restrict S μ)

/-- The ratios, in the tail their mean in `S`. -/
def tailRatio (options : List ι) (μ r : ι → Rat) (S : ι → Bool) (i : ι) : Rat :=
  if S i then r i else meanRatio options μ r S

/-- The largest base weight of an option with a ratio of at least 1; 0 if there is none. -/
def likeliest (μ r : ι → Rat) : List ι → Rat
  | [] => 0
  | i :: options => if 1 ≤ r i ∧ likeliest μ r options < μ i then μ i else likeliest μ r options

/-- Whether an option is in `S`. -/
def plausible (options : List ι) (μ r : ι → Rat) (p : Rat) (n : ι → Nat) (j : ι) : Bool :=
  decide (0 < n j) || decide (p * likeliest μ r options ≤ μ j)

/-- The distribution that gives options of `S` their ratio times their base weight, up to a factor, and leaves the tail. -/
def plausibleTilt (options : List ι) (μ r : ι → Rat) (p : Rat) (n : ι → Nat) (i : ι) : Rat :=
  let S := plausible options μ r p n
  μ i * tailRatio options μ r S i / meanRatio options μ r S

/-- The complement distribution that leaves the tail. -/
def plausibleTarget (options : List ι) (μ : ι → Rat) (m k p : Rat) (n v : ι → Nat) : ι → Rat :=
  plausibleTilt options μ (fun i => ratio m k (n i) (v i)) p n

/-- The same where nothing rises for having been accepted. -/
def cappedPlausibleTarget (options : List ι) (μ : ι → Rat) (m k p : Rat) (n v : ι → Nat) : ι → Rat :=
  plausibleTilt options μ (fun i => capped (ratio m k (n i) (v i))) p n

/-! ### Any set `S` with an option -/

section
variable {options : List ι} {μ r : ι → Rat} {S : ι → Bool} {i j : ι}

theorem restrict_sum_pos {f : ι → Rat} (hf : ∀ a ∈ options, 0 < f a) (hj : j ∈ options) (hS : S j = true) :
    0 < sumOver options (restrict S f) := by
  have hle : ∀ a ∈ options, 0 ≤ restrict S f a := fun a ha => by
    have := hf a ha
    unfold restrict; split <;> grind
  have := le_sumOver hle hj
  have := hf j hj
  have : restrict S f j = f j := by simp [restrict, hS]
  grind

theorem meanRatio_pos (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hj : j ∈ options) (hS : S j = true) :
    0 < meanRatio options μ r S := by
  unfold meanRatio
  rw [Rat.lt_div_iff (restrict_sum_pos hμ hj hS), Rat.zero_mul]
  exact restrict_sum_pos (fun a ha => Rat.mul_pos (hμ a ha) (hr a)) hj hS

theorem tailRatio_pos (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hj : j ∈ options) (hS : S j = true) (a : ι) :
    0 < tailRatio options μ r S a := by
  unfold tailRatio; split
  · exact hr a
  · exact meanRatio_pos hμ hr hj hS

theorem meanRatio_mul (hμ : ∀ a ∈ options, 0 < μ a) (hj : j ∈ options) (hS : S j = true) :
    sumOver options (restrict S μ) * meanRatio options μ r S = sumOver options (restrict S fun a => μ a * r a) := by
  have := restrict_sum_pos hμ hj hS
  unfold meanRatio
  generalize sumOver options (restrict S μ) = B at *
  grind

/-- The tail stands at the mean, so the mean over all options is that of `S`. -/
theorem tailRatio_total (hμ : ∀ a ∈ options, 0 < μ a) (hsum : sumOver options μ = 1) (hj : j ∈ options)
    (hS : S j = true) : sumOver options (fun a => μ a * tailRatio options μ r S a) = meanRatio options μ r S := by
  have mean := meanRatio_mul (r := r) hμ hj hS
  unfold tailRatio
  generalize meanRatio options μ r S = Z at *
  have split : sumOver options (fun a => μ a * (if S a then r a else Z)) + sumOver options (restrict S μ) * Z =
      sumOver options (restrict S fun a => μ a * r a) + sumOver options μ * Z := by
    rw [← sumOver_mul_right, ← sumOver_mul_right, ← sumOver_add, ← sumOver_add]
    exact sumOver_congr fun a _ => by unfold restrict; split <;> grind
  rw [hsum] at split
  grind

end

/-! ### The plausible options -/

section
variable {options : List ι} {μ r : ι → Rat} {p : Rat} {n : ι → Nat} {i j : ι}

/-- No option with a ratio of at least 1 is likelier than the likeliest. -/
theorem le_likeliest (hj : j ∈ options) (h : 1 ≤ r j) : μ j ≤ likeliest μ r options := by
  induction options with
  | nil => simp at hj
  | cons a l ih =>
    unfold likeliest
    rcases List.mem_cons.mp hj with rfl | hj
    · split <;> grind
    · have := ih hj
      split <;> grind

/-- It is one of them, if there is any. -/
theorem likeliest_mem (μ r : ι → Rat) (options : List ι) :
    likeliest μ r options = 0 ∨ ∃ i ∈ options, 1 ≤ r i ∧ likeliest μ r options = μ i := by
  induction options with
  | nil => simp [likeliest]
  | cons a l ih =>
    unfold likeliest
    split
    · next h => exact Or.inr ⟨a, by simp, h.1, rfl⟩
    · rcases ih with h | ⟨i, hi, h⟩
      · exact Or.inl h
      · exact Or.inr ⟨i, by simp [hi], h⟩

/-- What was up is plausible. -/
theorem plausible_judged (h : 0 < n j) : plausible options μ r p n j = true := by simp [plausible, h]

/-- With `p = 0` every option is plausible. -/
theorem plausible_zero (hμ : ∀ a ∈ options, 0 < μ a) (hj : j ∈ options) : plausible options μ r 0 n j = true := by
  have := hμ j hj
  simp only [plausible, Rat.zero_mul, Bool.or_eq_true, decide_eq_true_eq]
  grind

/-- Some option is plausible, whatever was rejected. -/
theorem plausible_exists (hμ : ∀ a ∈ options, 0 < μ a) (hne : options ≠ []) (hp : p ≤ 1) :
    ∃ j ∈ options, plausible options μ r p n j = true := by
  rcases likeliest_mem μ r options with h | ⟨i, hi, _, h⟩
  · obtain ⟨j, hj⟩ := List.exists_mem_of_ne_nil options hne
    have := hμ j hj
    refine ⟨j, hj, ?_⟩
    simp only [plausible, h, Rat.mul_zero, Bool.or_eq_true, decide_eq_true_eq]
    grind
  · refine ⟨i, hi, ?_⟩
    have := mul_le_mul_nonneg (Rat.le_of_lt (hμ i hi)) hp
    simp only [plausible, h, Bool.or_eq_true, decide_eq_true_eq]
    grind

end

/-! ### The axioms, for any positive ratios -/

section
variable {options : List ι} {μ r : ι → Rat} {p : Rat} {n : ι → Nat} {i j : ι}

/-- It is the distribution of the ratios with their mean in the tail: all of `tilt` holds of it. -/
theorem plausibleTilt_eq_tilt (hμ : ∀ a ∈ options, 0 < μ a) (hsum : sumOver options μ = 1) (hp : p ≤ 1)
    (hi : i ∈ options) :
    plausibleTilt options μ r p n i = tilt options μ (tailRatio options μ r (plausible options μ r p n)) i := by
  obtain ⟨s, hs, hS⟩ := plausible_exists (r := r) (n := n) hμ (List.ne_nil_of_mem hi) hp
  unfold plausibleTilt tilt
  rw [tailRatio_total hμ hsum hs hS]

/-- Positivity: no option dies, plausible or not. -/
theorem plausibleTilt_pos (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hsum : sumOver options μ = 1) (hp : p ≤ 1)
    (hi : i ∈ options) : 0 < plausibleTilt options μ r p n i := by
  obtain ⟨s, hs, hS⟩ := plausible_exists (r := r) (n := n) hμ (List.ne_nil_of_mem hi) hp
  rw [plausibleTilt_eq_tilt hμ hsum hp hi]
  exact tilt_pos hμ (tailRatio_pos hμ hr hs hS) hi

/-- Normalisation: the target sums to exactly 1. -/
theorem plausibleTilt_sum (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hsum : sumOver options μ = 1) (hp : p ≤ 1)
    (hne : options ≠ []) : sumOver options (plausibleTilt options μ r p n) = 1 := by
  obtain ⟨s, hs, hS⟩ := plausible_exists (r := r) (n := n) hμ hne hp
  rw [sumOver_congr fun a ha => plausibleTilt_eq_tilt hμ hsum hp ha]
  exact tilt_sum hμ (tailRatio_pos hμ hr hs hS) hne

/-- The tail keeps its base weight. -/
theorem plausibleTilt_tail (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hp : p ≤ 1) (hi : i ∈ options)
    (hS : plausible options μ r p n i = false) : plausibleTilt options μ r p n i = μ i := by
  obtain ⟨s, hs, hS'⟩ := plausible_exists (r := r) (n := n) hμ (List.ne_nil_of_mem hi) hp
  have := meanRatio_pos hμ hr hs hS'
  simp only [plausibleTilt, tailRatio, hS]
  generalize meanRatio options μ r (plausible options μ r p n) = Z at *
  grind

/-- The plausible options share with one factor `Z`: `P i = μ i * r i / Z`. -/
theorem plausibleTilt_plausible (hS : plausible options μ r p n i = true) :
    plausibleTilt options μ r p n i = μ i * r i / meanRatio options μ r (plausible options μ r p n) := by
  simp [plausibleTilt, tailRatio, hS]

/-- Two plausible options stand to each other as their own ratios say, whatever else there is. -/
theorem plausibleTilt_odds (hi : plausible options μ r p n i = true) (hj : plausible options μ r p n j = true) :
    plausibleTilt options μ r p n i * (μ j * r j) = plausibleTilt options μ r p n j * (μ i * r i) := by
  rw [plausibleTilt_plausible hi, plausibleTilt_plausible hj]
  generalize meanRatio options μ r (plausible options μ r p n) = Z
  grind

/-- Monotonicity: of two plausible options that with the smaller ratio has the smaller share of its base weight. -/
theorem plausibleTilt_monotone (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hsum : sumOver options μ = 1)
    (hp : p ≤ 1) (hi : i ∈ options) (hj : j ∈ options) (hSi : plausible options μ r p n i = true)
    (hSj : plausible options μ r p n j = true) (h : r j < r i) :
    plausibleTilt options μ r p n j / μ j < plausibleTilt options μ r p n i / μ i := by
  rw [plausibleTilt_eq_tilt hμ hsum hp hi, plausibleTilt_eq_tilt hμ hsum hp hj]
  exact tilt_monotone hμ (tailRatio_pos hμ hr hi hSi) hi hj (by simpa [tailRatio, hSi, hSj] using h)

/-- A plausible option rises, and exactly then, if its ratio is above the mean. -/
theorem plausibleTilt_above_iff (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hi : i ∈ options)
    (hS : plausible options μ r p n i = true) :
    μ i < plausibleTilt options μ r p n i ↔ meanRatio options μ r (plausible options μ r p n) < r i := by
  rw [plausibleTilt_plausible hS, Rat.lt_div_iff (meanRatio_pos hμ hr hi hS)]
  exact Rat.mul_lt_mul_left (hμ i hi)

/-- Where all plausible options have one ratio the target is the base measure. -/
theorem plausibleTilt_fixed (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hp : p ≤ 1) (hi : i ∈ options) {c : Rat}
    (hc : ∀ a ∈ options, plausible options μ r p n a = true → r a = c) : plausibleTilt options μ r p n i = μ i := by
  cases hS : plausible options μ r p n i with
  | false => exact plausibleTilt_tail hμ hr hp hi hS
  | true =>
    have hB := restrict_sum_pos hμ hi hS
    have mean : meanRatio options μ r (plausible options μ r p n) = c := by
      have : sumOver options (restrict (plausible options μ r p n) fun a => μ a * r a) =
          sumOver options (restrict (plausible options μ r p n) μ) * c := by
        rw [← sumOver_mul_right]
        refine sumOver_congr fun a ha => ?_
        unfold restrict; split
        · next h => simp only [hc a ha h]
        · rw [Rat.zero_mul]
      unfold meanRatio
      rw [this]
      generalize sumOver options (restrict (plausible options μ r p n) μ) = B at *
      grind
    have := hr i
    rw [plausibleTilt_plausible hS, mean, hc i hi hS]
    have := hc i hi hS
    grind

/-- What rejections take from plausible options goes to plausible options: together they keep their mass. -/
theorem plausibleTilt_mass (hμ : ∀ a ∈ options, 0 < μ a) (hr : ∀ a, 0 < r a) (hi : i ∈ options)
    (hS : plausible options μ r p n i = true) :
    sumOver options (restrict (plausible options μ r p n) (plausibleTilt options μ r p n)) =
      sumOver options (restrict (plausible options μ r p n) μ) := by
  have hZ := meanRatio_pos hμ hr hi hS
  have mean := meanRatio_mul (r := r) hμ hi hS
  have each : sumOver options (restrict (plausible options μ r p n) (plausibleTilt options μ r p n)) =
      sumOver options (restrict (plausible options μ r p n) fun a => μ a * r a) *
        (meanRatio options μ r (plausible options μ r p n))⁻¹ := by
    rw [← sumOver_mul_right]
    refine sumOver_congr fun a _ => ?_
    unfold restrict; split
    · next h => rw [plausibleTilt_plausible h, Rat.div_def]
    · rw [Rat.zero_mul]
  rw [each, ← mean]
  generalize meanRatio options μ r (plausible options μ r p n) = Z at *
  grind

/-- With `p = 0` the mass goes to all options in proportion. -/
theorem plausibleTilt_zero (hμ : ∀ a ∈ options, 0 < μ a) (hsum : sumOver options μ = 1) (hi : i ∈ options) :
    plausibleTilt options μ r 0 n i = tilt options μ r i := by
  have all : ∀ a ∈ options, μ a * tailRatio options μ r (plausible options μ r 0 n) a = μ a * r a := fun a ha => by
    simp [tailRatio, plausible_zero hμ ha]
  rw [plausibleTilt_eq_tilt hμ hsum (Rat.le_of_lt zero_lt_one) hi]
  unfold tilt
  rw [all i hi, sumOver_congr all]

end

/-! ### The ratios of judged options -/

section
variable {options : List ι} {μ : ι → Rat} {m k p : Rat} {n v : ι → Nat} {i j : ι}

/-- Positivity, for the ratios that the code computes. -/
theorem plausibleTarget_pos (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hsum : sumOver options μ = 1)
    (hp : p ≤ 1) (hi : i ∈ options) : 0 < plausibleTarget options μ m k p n v i :=
  plausibleTilt_pos hμ (fun _ => ratio_pos hm hk _ _) hsum hp hi

/-- Normalisation, for the ratios that the code computes. -/
theorem plausibleTarget_sum (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hsum : sumOver options μ = 1)
    (hp : p ≤ 1) (hne : options ≠ []) : sumOver options (plausibleTarget options μ m k p n v) = 1 :=
  plausibleTilt_sum hμ (fun _ => ratio_pos hm hk _ _) hsum hp hne

/-- Monotonicity at equal rounds: the more rejected of two options has the smaller ratio to its base weight. -/
theorem plausibleTarget_monotone (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hsum : sumOver options μ = 1)
    (hp : p ≤ 1) (hi : i ∈ options) (hj : j ∈ options) (hn : n i = n j) (h : v i < v j) (hT : v i < n i) :
    plausibleTarget options μ m k p n v j / μ j < plausibleTarget options μ m k p n v i / μ i :=
  plausibleTilt_monotone hμ (fun _ => ratio_pos hm hk _ _) hsum hp hi hj (plausible_judged (by omega))
    (plausible_judged (by omega)) (by rw [← hn]; exact ratio_lt hm hk h hT)

/-- Two judged options stand to each other as where the mass goes to all: the odds of `ownTarget_odds`. -/
theorem plausibleTarget_odds (hi : 0 < n i) (hj : 0 < n j) :
    plausibleTarget options μ m k p n v i * (μ j * ratio m k (n j) (v j)) =
      plausibleTarget options μ m k p n v j * (μ i * ratio m k (n i) (v i)) :=
  plausibleTilt_odds (plausible_judged hi) (plausible_judged hj)

/-- If nothing was ever up, the target is the base measure. -/
theorem plausibleTarget_unseen (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a) (hp : p ≤ 1) (hi : i ∈ options)
    (hn : ∀ a, n a = 0) : plausibleTarget options μ m k p n v i = μ i :=
  plausibleTilt_fixed hμ (fun _ => ratio_pos hm hk _ _) hp hi fun a _ _ => by rw [hn a, ratio_unseen hm hk]

/-- With `p = 0` it is the target where the mass goes to all options. -/
theorem plausibleTarget_zero (hμ : ∀ a ∈ options, 0 < μ a) (hsum : sumOver options μ = 1) (hi : i ∈ options) :
    plausibleTarget options μ m k 0 n v i = ownTarget options μ m k n v i :=
  plausibleTilt_zero hμ hsum hi

/-- Positivity where ratios are capped. -/
theorem cappedPlausibleTarget_pos (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a)
    (hsum : sumOver options μ = 1) (hp : p ≤ 1) (hi : i ∈ options) :
    0 < cappedPlausibleTarget options μ m k p n v i :=
  plausibleTilt_pos hμ (fun _ => capped_pos (ratio_pos hm hk _ _)) hsum hp hi

/-- Normalisation where ratios are capped. -/
theorem cappedPlausibleTarget_sum (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a)
    (hsum : sumOver options μ = 1) (hp : p ≤ 1) (hne : options ≠ []) :
    sumOver options (cappedPlausibleTarget options μ m k p n v) = 1 :=
  plausibleTilt_sum hμ (fun _ => capped_pos (ratio_pos hm hk _ _)) hsum hp hne

/-- Monotonicity at equal rounds where ratios are capped, for an option that was worse than presumed. -/
theorem cappedPlausibleTarget_monotone (hm : 0 < m) (hk : 0 < k) (hμ : ∀ a ∈ options, 0 < μ a)
    (hsum : sumOver options μ = 1) (hp : p ≤ 1) (hi : i ∈ options) (hj : j ∈ options) (hn : n i = n j) (h : v i < v j)
    (hT : v i < n i) (hw : ((n j - min (v j) (n j) : Nat) : Rat) < n j * m) :
    cappedPlausibleTarget options μ m k p n v j / μ j < cappedPlausibleTarget options μ m k p n v i / μ i :=
  plausibleTilt_monotone hμ (fun _ => capped_pos (ratio_pos hm hk _ _)) hsum hp hi hj (plausible_judged (by omega))
    (plausible_judged (by omega)) (capped_lt (by rw [← hn]; exact ratio_lt hm hk h hT) ((ratio_below_iff hm hk).mpr hw))

end

end Buleyean
