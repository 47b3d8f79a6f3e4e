import os

from tests.helpers.hub_server import HUB


# huggingface_hub reads these once, when it is first imported: the whole run talks to the server of these tests, which
# is empty until a test fills it, and to nobody else.
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch

from tests.helpers.hub_world import hub as hub


torch.set_num_threads(1)  # the models are so tiny that threads only wait for each other
