"""LOMO in a plain PyTorch loop: all parameters are trained, no optimizer state exists, and one gradient at a time.

Run: `python examples/library_use.py`. The model is tiny and made in place; any Hugging Face model works the same way.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lomo_core.optim import Lomo

torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config).to(torch.bfloat16)
optimizer = Lomo(model.parameters(), lr=0.03, max_grad_norm=1.0, rounding="stochastic")

text = torch.tensor([list(b"Full-parameter fine-tuning for limited resources. " * 2)])
for step in range(1, 61):
    loss = model(input_ids=text, labels=text).loss
    optimizer.backward(loss)  # two passes: the exact global norm, then every update inside of the second
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.detach():.3f}, gradient norm {optimizer.last_grad_norm:.2f}")

largest = max(p.numel() * p.element_size() for p in model.parameters())
print(f"gradients alive at once: {optimizer.peak_gradient_bytes} bytes; the largest tensor has {largest}")
