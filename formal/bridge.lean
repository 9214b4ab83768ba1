/-!
The bridge: `prove.py` appends this text and one `#eval` per case to `Buleyean/Complement.lean` and `Plausible.lean`, so
what is evaluated is the very `ratio`, `ownTarget`, `cappedTarget`, `plausibleTarget` and `cappedPlausibleTarget` that the
theorems are about.
-/

namespace Buleyean

-- Own recursions: the WebAssembly build cannot call the list functions of the library from compiled code.

def lookup {α : Type} [Inhabited α] : List α → Nat → α
  | [], _ => default
  | a :: _, 0 => a
  | _ :: l, n + 1 => lookup l n

def upTo : Nat → List Nat → List Nat
  | 0, l => l
  | n + 1, l => upTo n (n :: l)

def spaced {α : Type} [ToString α] (f : Nat → α) : Nat → String
  | 0 => ""
  | n + 1 => spaced f n ++ " " ++ toString (f n)

/-- A case of `n` options with their prior, rounds, counts and base measure, printed as fractions with a bar between: the
ratios, the targets, those with ratios capped, and both again that leave the tail of `p`, of the base measure that sums
to 1. -/
def evaluate (n : Nat) (m k p : Rat) (T v : List Nat) (μ : List Rat) : String :=
  let fractions (x : Nat → Rat) := spaced (fun i => toString (x i).num ++ "/" ++ toString (x i).den) n
  let options := upTo n []
  let total := sumOver options (lookup μ)
  let normalised i := lookup μ i / total
  fractions (fun i => ratio m k (lookup T i) (lookup v i)) ++ " |" ++
    fractions (ownTarget options (lookup μ) m k (lookup T) (lookup v)) ++ " |" ++
    fractions (cappedTarget options (lookup μ) m k (lookup T) (lookup v)) ++ " |" ++
    fractions (plausibleTarget options normalised m k p (lookup T) (lookup v)) ++ " |" ++
    fractions (cappedPlausibleTarget options normalised m k p (lookup T) (lookup v))

end Buleyean
