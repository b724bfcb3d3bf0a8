"""The building blocks of a MoMa model: modules over `kernels`, given a batch as an argument."""
