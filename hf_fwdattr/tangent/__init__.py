"""Forward-mode derivatives of decoder-only language models, layer by layer, written out.

Torch's forward mode carries a derivative through every operation that a model is made of; most of its time goes into
elementwise operations on all probes. Here a layer's derivative is a few matrix products and as few passes over memory
as it takes. What is written out is checked against what the model computed, layer by layer, on every batch: models
that compute something else are left to torch.
"""
