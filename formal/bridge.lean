/-!
The bridge: `prove.py` appends this text and one `#eval` per case to `Buleyean/Complement.lean`, so what is
evaluated is the very `weight` and `ownTarget` that the theorems are about.
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

/-- A case of `n` options with their rounds, counts and base measure, printed as the weights, a bar, and the targets as fractions. -/
def evaluate (n : Nat) (T v : List Nat) (μ : List Rat) : String :=
  let p := ownTarget (upTo n []) (lookup μ) (lookup T) (lookup v)
  spaced (fun i => weight (lookup T i) (lookup v i)) n ++ " |" ++
    spaced (fun i => toString (p i).num ++ "/" ++ toString (p i).den) n

end Buleyean
