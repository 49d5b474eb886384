"""With this folder on PYTHONPATH torch takes the GPU for a T4: compute capability 7.5, without bf16.

What is compiled and which attention runs is still the real GPU's. What asks torch for the card's age is
misled, such as Unsloth's choice of kernels, bitsandbytes and this project's plan.
"""

import types

import torch
import triton

target = triton.runtime.driver.active.get_current_target()
triton.backends.nvidia.driver.CudaDriver.get_current_target = lambda driver: (
    target
)  # Triton compiles for the real GPU
real_properties = torch.cuda.get_device_properties


def properties(device: object = None) -> object:
    real = real_properties(device)
    run_cli = {name: getattr(real, name) for name in dir(real) if not name.startswith("_")}
    return types.SimpleNamespace(**(run_cli | {"major": 7, "minor": 5, "name": "an imitated T4"}))


torch.cuda.get_device_capability = lambda device=None: (7, 5)
torch.cuda.get_device_properties = properties
torch.cuda.is_bf16_supported = lambda *_, **__: False
