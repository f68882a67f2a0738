"""Float64 NumPy/SciPy references, one file per method, written from the papers.

Nothing here imports a tensor library. Every function is analytic in its real
inputs and accepts complex ones, so `complex_step.gradient` differentiates it to
machine precision: no finite-difference error, and no autodiff shared with the code
under test.
"""
