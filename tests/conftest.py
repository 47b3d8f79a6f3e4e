import torch


torch.set_num_threads(1)  # the models are so tiny that threads only wait for each other
