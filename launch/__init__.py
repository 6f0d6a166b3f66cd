"""torchx components that launch pretraining on clusters."""
