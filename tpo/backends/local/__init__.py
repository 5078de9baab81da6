"""Models in this process: weights, tokens, batches. Everything that imports torch or transformers is in here."""

import os

# Read when torch is first imported: threads that spin while they wait starve whoever shares the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A repository with a pickle alone is refused; transformers would ask a service on the Hub to convert it.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
