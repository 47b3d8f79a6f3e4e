"""The demo: teach a small model facts, ask it, and see which rows taught them."""
