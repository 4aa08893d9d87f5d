"""Floating-point operations: how many a pass needs, and how many a second this device makes. And
how much memory was needed."""
import resource
import sys
import time

import torch

from core.parallel import autocast


def training_flops(model, encoded: list, shared: bool) -> float:
    """FLOPs of a forward and a backward pass: 6 a weight and token, 12 a layer, channel and (query,
    key) pair.

    The head's weights count at response tokens alone, where it is applied. Recomputation and
    padding are not counted: they are work, and no progress.
    """
    head = model.get_input_embeddings().weight.numel()
    body = sum(p.numel() for p in model.base_model.parameters()) - head
    config = model.config.get_text_config()
    channels = config.num_hidden_layers * config.hidden_size
    total = 0
    for prompt, ys in encoded:
        n = len(prompt)
        lengths = [len(y) - 1 for y in ys]
        prompts = 1 if shared else len(ys)
        attended = prompts * n * (n + 1) / 2 + sum(m * n + m * (m + 1) / 2 for m in lengths)
        total += 6 * body * (prompts * n + sum(lengths))
        total += 6 * head * sum(map(len, ys))
        total += 12 * channels * attended
    return total


def matmul_flops(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product here, the yardstick of model-FLOP utilisation (MFU)."""
    size, times = (4096, 10) if device.type == "cuda" else (1024, 3)
    with autocast(device, precision):
        x = torch.randn(size, size, device=device)
        # Cast beforehand: only the products are timed.
        x = x.to((x @ x).dtype)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(times):
                y = x @ x
            y[0, 0].item()  # waits for the device
            seconds.append((time.perf_counter() - start) / times)
    return 2 * size ** 3 / min(seconds)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10⁹ bytes: the GPU's where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
