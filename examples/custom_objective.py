"""An objective of your own on the library's records, tries and adapters: unlikelihood with an anchor.

The library's own objectives are `complement_loss`, `listwise_loss` and `published_loss`, with the same arguments.
"""

import torch
from peft import LoraConfig
from torch.nn.functional import kl_div

from buleyean_rl import Counts, attach_lora, build_boundary, load_base, load_tokenizer, make_record

RECORDS = [
    make_record("Where is my order?", ["I don't know, ask somebody else."]),
    make_record("Can I return this?", ["No idea, read the rules."]),
]


def unlikelihood(logits, reference_logits, counts):
    """-c_i log(1 - pi_i) where i was rejected, and KL(reference || pi), in nats at each node. Shape: (nodes,)."""
    log_pi = logits.log_softmax(-1)
    rejected = log_pi[counts.node, counts.option].exp().clamp_max(0.999)
    push = counts.sum_by_node(-counts.rate * torch.log1p(-rejected))
    anchor = kl_div(log_pi, reference_logits.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return push + anchor


def logits_at_nodes(model, boundary):
    """The trie of one answer is a line: its nodes are the prompt's last token and every token after it."""
    ids = torch.tensor([boundary.prompt + boundary.tokens])
    return model(ids).logits[0, len(boundary.prompt) - 1 :]


def counts_of(boundary):
    """What was judged at each node, and how often it was rejected."""
    node, token, rejected, judged, *_ = (torch.tensor(column) for column in zip(*boundary.judgements, strict=True))
    return Counts(node, token, rejected.float(), judged.float(), boundary.nodes)


def main():
    tokenizer = load_tokenizer("smollm2-135m")
    boundaries = [build_boundary(record, tokenizer, max_length=256) for record in RECORDS]
    base = load_base("smollm2-135m")
    with torch.no_grad():
        references = [logits_at_nodes(base, boundary) for boundary in boundaries]
    model = attach_lora(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-4)
    for epoch in range(3):
        losses = []
        for boundary, reference in zip(boundaries, references, strict=True):
            loss = unlikelihood(logits_at_nodes(model, boundary), reference, counts_of(boundary)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: {sum(losses) / len(losses):.4f} nats a node")


if __name__ == "__main__":
    main()
