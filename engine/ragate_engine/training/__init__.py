"""Training of LoRA adapters on a frozen, dense or packed, base: plain torch autograd over shared-prefix packs."""
