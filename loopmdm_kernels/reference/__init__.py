"""The ops in plain PyTorch: any dtype up to float64, differentiable. The oracle of every test."""
