"""One training run: a records file in, a run folder out.

config             every setting, presets
run                `train()`: the whole run, stage by stage
dataset            records --> training and held-out boundaries
own_samples        the base model's own answers beside the rejected ones
trainer            Hugging Face's loop around the fused loss
processes, heartbeat    processes that train together, and whether they live
reference_cache    the reference's hidden states, from epoch to epoch
guard              ends a run before it ruins the model
before_after, held_out  the objective, neutral text and drift, before and after
estimate, dry_run  time and memory, from a trial step; all that a run would take
progress, report   progress bar; run.json, loss.png, the card
checkpoints        run folders while they are written
runs               run folders side by side
"""
