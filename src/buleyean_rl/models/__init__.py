"""Base models: found, loaded, adapted; and how their layers compute.

name --source--> where it is --weights--> transformers model --adapt--> PEFT model

source, weights, run_folder      find and load
compute, views, output_head      dtype and device; decoder, head, the base without its adapter
adapt, lora, adapted_linear      LoRA layers
fused_layers, fused_decoder      layers in fewer passes
segments, packed_attention       attention over a packed sequence
gradient_buffer                  the adapters' gradients in one tensor
"""
