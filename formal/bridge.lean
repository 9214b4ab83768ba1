/-!
The bridge: `prove.py` appends this text and one `#eval` per case to `Buleyean/Complement.lean`, so what is
evaluated is the very `ratio`, `ownTarget` and `cappedTarget` that the theorems are about.
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

/-- A case of `n` options with their prior, rounds, counts and base measure, printed as fractions: the ratios, a bar, the
targets, a bar, and the targets with ratios capped. -/
def evaluate (n : Nat) (m k : Rat) (T v : List Nat) (μ : List Rat) : String :=
  let fractions (p : Nat → Rat) := spaced (fun i => toString (p i).num ++ "/" ++ toString (p i).den) n
  fractions (fun i => ratio m k (lookup T i) (lookup v i)) ++ " |" ++
    fractions (ownTarget (upTo n []) (lookup μ) m k (lookup T) (lookup v)) ++ " |" ++
    fractions (cappedTarget (upTo n []) (lookup μ) m k (lookup T) (lookup v))

end Buleyean
