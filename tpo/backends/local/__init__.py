"""Models in this process: weights, tokens, batches. Only this package imports torch or transformers."""

import os

# Read when torch is first imported. Threads that spin while they wait would starve other users of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A repository that holds only a pickle is refused; transformers would ask a service on the Hub to convert it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
