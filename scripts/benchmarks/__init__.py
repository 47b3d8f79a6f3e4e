"""Measurements of hf_fwdattr: worlds, methods, protocols that compare them, and the report made of the results."""
