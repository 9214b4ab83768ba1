"""Base models: located, loaded, adapted; and how their layers compute.

name --source--> location --weights--> transformers model --adapt--> PEFT model; `model.Model` owns all of them

model                               one model: source, tokenizer, module, head, layout, dtype, kernels
source, hub, weights, run_folder, run_files    locate and load
model_folder, gguf_header           what must be right before anything is loaded
weight_checks, adapter_folder       what must be right of the weights, and of an adapter's
skeleton, template_end              parameters without weights; where a template ends an answer
placement, layout_probe, output_head  dtype and device; packed or padded; logits
views                               a module's parts: decoder, head, the base without its adapter
adapt, lora, adapted_linear         LoRA layers
fused_layers, fused_decoder         layers in fewer passes
segments, packed_attention          attention over a packed sequence
gradient_buffer                     the adapters' gradients in one tensor
pre_tokenizers                      splits of text before BPE, by llama.cpp's names
private_interfaces                  private interfaces of other libraries, in one place
"""
