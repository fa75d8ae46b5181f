"""Plausible records of runs that never happened, for tests of what reads records."""

from __future__ import annotations

import math
import random
from pathlib import Path

from fedms.config import load_config
from fedms.storage.run_folder import RunFolder

DOMAINS = ("films", "news", "products", "tweets")
LEVEL = {"local": 0.66, "fedavg": 0.694, "fedavg_prior": 0.703, "fedavg_ft": 0.709, "fedms": 0.712, "fedms_plus": 0.714}


def write_run(folder: Path, method: str = "fedms", seed: int = 0, *, clients: int = 12, unseen: int = 2,
              rounds: tuple[int, int] = (8, 4), collapsed: bool = False, sets: tuple[str, ...] = (), stop_after: int | None = None,
              round_seconds: float | None = None) -> Path:
    """Write a run folder; ``stop_after`` rounds the run is killed: no clients and no summary. ``round_seconds``: of a
    round on the simulated clock."""
    config = load_config("sentiment", [f"run.method={method}", f"run.seed={seed}", f"clients.count={clients}",
                                       f"clients.unseen={unseen}", f"stage1.rounds={rounds[0]}",
                                       f"stage2.rounds={rounds[1]}", *sets])
    out = RunFolder.create(folder, config)
    noise = random.Random(f"{method}-{seed}")
    level = LEVEL.get(method, 0.69) + noise.gauss(0, 0.003)
    stages = [("stage1", rounds[0]), ("stage2", rounds[1])]
    private = {"fedavg_ft": "stage2", "local": "stage1"}.get(method)  # the stage from which on nothing is sent
    done, up, depth = 0, 0, 1
    for stage, count in stages:
        for number in range(1, count + 1):
            if done == stop_after:
                out.close()
                return folder
            progress = 1 - math.exp(-number / 2.5)
            start = 0.5 if stage == stages[0][0] else level - 0.01
            validation = start + (level - start) * progress + noise.gauss(0, 0.004)
            event = None
            if stage == "stage1" and number == 6:
                depth, event = 2, "activated blocks 5"
            gate = min(0.97 if collapsed else 0.63, 0.5 + 0.13 * number)
            gated = method == "fedms" and stage == "stage2"
            sent = 0 if private and stage >= private else clients * 4 * (9000 if gated else 72000 * depth)
            up += sent
            for client in range(clients):
                out.append_visit({
                    "stage": stage, "round": number, "client": client, "depth": depth, "status": "ok",
                    "n_train": 180, "loss": 1.1 - progress / 2, "validation_accuracy": validation,
                    "validation_loss": 0.9 - progress / 4, "flops": 10**11, "seconds": noise.random(), "bytes_up": sent // clients,
                    "bytes_down": sent // clients, "trained_params": 55000 * depth, "trained_percent": 0.24 * depth,
                    "peak_memory_bytes": 9 * 10**8, "gate_mean": gate if gated else None})
            out.append_round({
                "stage": stage, "round": number, "depth": depth, "clients": clients, "loss": 1.1 - progress / 2,
                "validation_accuracy": validation, "validation_loss": 0.9 - progress / 4, "bytes_up": sent,
                "bytes_down": sent, "gate_mean": gate if gated else None, "gate_entropy": 0.6 if gated else None,
                "seconds": 10 + noise.random(), "simulated_seconds": round_seconds, "event": event})
            done += 1
    accuracies = []
    draw = random.Random(seed)
    for client in range(clients + unseen):
        group = DOMAINS[client % 4]
        base = {"films": 0.04, "news": -0.06, "products": -0.03, "tweets": 0.05}[group] + draw.gauss(0, 0.03)
        own = level + base + noise.gauss(0, 0.015)
        accuracies.append(own)
        gate = (0.97 if collapsed else 0.6) + noise.uniform(-0.03, 0.03)
        accuracy = {"personalized": own, "zero_shot": 0.52 + base,
                    "global": None if method == "local" else own if method == "fedavg" else 0.69 + base,
                    "local": own if method in ("local", "fedavg_ft") else None}
        if method == "fedms":
            accuracy |= {"local": 0.66 + base} | {"mixture": own, "half": own + 0.002, "oracle": own + 0.06}
        out.append_client({
            "id": client, "group": group, "unseen": client >= clients, "n_train": 180 + client, "n_validation": 45,
            "n_test": 75, "accuracy": accuracy, "macro_f1": own - 0.08, "calibration_error": 0.9 - own, "auroc": own + 0.1,
            "gate_mean": gate if method == "fedms" else None, "gate_std": 0.09 if method == "fedms" else None,
            "gate_entropy": 0.61 if method == "fedms" else None})
    seen = sorted(accuracies[:clients])
    mean = sum(seen) / clients
    worst = seen[:max(1, math.ceil(clients / 10))]
    out.write_summary({
        "method": method, "model": "minilm", "dataset": "sentiment", "seed": seed,
        "rounds": dict(stages),
        "personalized_accuracy": {"mean": mean, "std": 0.05, "worst10": sum(worst) / len(worst)},
        "global_test_accuracy": mean - 0.02, "zero_shot_accuracy": 0.52, "macro_f1": mean - 0.08,
        "calibration_error": 0.9 - mean, "auroc": mean + 0.1,
        "unseen_accuracy": {"as_it_arrives": 0.68, "after_training": 0.69},
        "gate": {"mean": 0.97 if collapsed else 0.6, "std_clients": 0.02, "std_samples": 0.09,
                 "entropy": 0.1 if collapsed else 0.61, "collapsed": collapsed, "half_mix_accuracy": mean + 0.002,
                 "oracle_accuracy": mean + 0.06} if method == "fedms" else None,
        "final_depth": {"stage1": depth, "stage2": depth}, "trainable_params": 55000 * depth,
        "trainable_percent": 0.24 * depth, "bytes_up": up, "bytes_down": up, "flops": 10**13, "seconds": 123.4,
        "peak_memory_bytes": 9 * 10**8, "notes": []})
    out.close()
    return folder
