# SPDX-License-Identifier: Apache-2.0
"""What operations are asked and answer, by operation id, for the OpenAPI document; long lists are cut short."""

from __future__ import annotations

from typing import Any

_MODEL = {
    "name": "cifar10",
    "version": "1",
    "digest": "sha256:4a8610e64fc0e053b4c6f81e205ec5d73a73c443178a0315b45bfbf193dd3244",
}
_VERDICT: dict[str, Any] = {
    "request_id": "gate-7-000123",
    "model": _MODEL,
    "decision": "defer",
    "reason": "ood",
    "prediction": {"index": 3, "label": "cat", "confidence": 0.98},
    "ood": {
        "score_name": "grood",
        "score": 0.193,
        "threshold": 0.141,
        "p_value": 0.0031,
        "p_cutoff": 0.045,
        "group": "all",
        "target_id_acceptance": 0.95,
        "borderline": False,
        "shadow": {"knn": {"score": 1.2, "p_value": 0.01}},
    },
    "timing_ms": {"decode": 0.9, "queue": 1.2, "forward": 6.0, "score": 0.4, "total": 8.8},
}
_EXPLAINED = _VERDICT | {
    "explanation": {
        "nearest": [{"index": 3, "label": "cat", "distance": 6.1}, {"index": 5, "label": "dog", "distance": 6.4}],
        "ood_prototype": {"distance": 4.7, "pi": 0.61},
        "score_without": 0.082,
        "input_png": "iVBORw0KGgo=",
        "heat_png": "iVBORw0KGgo=",
    }
}
_POLICY = {
    "target_id_acceptance": 0.9,
    "guarantee": {"kind": "simultaneous", "delta": 0.05},
    "score_name": "grood",
    "alpha_conf": 0.0,
}
_CARD: dict[str, Any] = _MODEL | {
    "created": "2026-11-21T08:58:27+00:00",
    "ready": True,
    "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "preprocessing": {
        "resize": 32,
        "crop": [32, 32],
        "interpolation": "bilinear",
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.247, 0.2435, 0.2616],
    },
    "score": "grood",
    "shadow_scores": ["knn"],
    "calibration": {
        "n": 5000,
        "unit": "images",
        "source": "5,000 training images held out of training",
        "timestamp": 1795251596.05,
        "target_id_acceptance": 0.95,
        "guarantee": {"kind": "pac", "delta": 0.05},
        "expected_acceptance_interval": [0.9491, 0.9606],
        "scores_digest": "sha256:5d2c0c6ad3d64f4bb4ee8b9b4fa3b2c7f6f0b3f1e2f3a9a1b6e7f2f0c1d2e3f4",
        "splits_digest": "sha256:0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c4b5a69788796a5b4c3d2e1f0",
        "promise": "at least 0.95 of the images distributed as the calibration images are accepted, in 0.95 of "
        "calibrations (95 % of such calibrations accept 0.9491 to 0.9606); nothing is promised about OOD images.",
    },
    "forward": {"device": "cpu", "precision": "fp32", "mode": "compiled", "settled": True},
    "report": {"id": {"n": 5000, "accuracy": 0.932, "acceptance": 0.9492}},
    "failed_update": None,
}
_EVIDENCE = {"alarm": False, "alarms": 0, "images": 4210, "false_alarm_probability": 0.01}
_DRIFT: dict[str, Any] = {
    "model": "cifar10",
    "version": "1",
    "groups": {
        "all": {
            "images": 4210,
            "deferred": 205,
            "windows": [
                {
                    "size": 1000,
                    "filled": 210,
                    "windows": 4,
                    "deferred": 48,
                    "ratio": 0.048,
                    "ood_share_lower": 0.0,
                    "lower": 0.022,
                    "upper": 0.072,
                    "alarm": False,
                    "alarms": 0,
                }
            ],
            "cusum": {
                "value": 3,
                "limit": 318,
                "alarm": False,
                "alarms": 0,
                "deferral_rate": 0.0509,
                "shifted_rate": 0.0756,
                "run_length": 1026337.9,
                "delay": 1360.6,
            },
            "exchangeability": {"evidence_log10": -0.31, "limit_log10": 2.0} | _EVIDENCE,
            "deferral_rate": {"evidence_log10": -0.87, "limit_log10": 2.301} | _EVIDENCE,
            "alarms": {"window_1000": False, "cusum": False, "exchangeability": False, "deferral_rate": False},
        }
    },
}
_REPORT: dict[str, Any] = {
    "score": "grood",
    "policy": _POLICY,
    "calibration": [{"group": "all", "n": 5000, "threshold": 0.141, "edges": [0.0, 0.1, 0.2], "counts": [4690, 310]}],
    "evaluation": {
        "id": {"n": 5000, "accuracy": 0.932, "acceptance": 0.9492},
        "decisions": {"svhn-test": {"n": 2000, "left_out": 0, "deferral": 0.635, "group": "far"}},
        "ood": {"svhn-test": {"auroc": 0.94, "ood_miss_rate_at_id95": 0.36, "id_flag_rate_at_ood95": 0.21}},
        "shifted": {},
        "p_values": None,
    },
    "targets": [
        {
            "target_id_acceptance": 0.9,
            "guarantee": {"kind": "simultaneous", "delta": 0.05},
            "threshold": 0.117,
            "id_deferral": 0.083,
            "caught": {"svhn-test": 0.71},
        }
    ],
}
_MONITOR: dict[str, Any] = {
    "slot_seconds": 10,
    "slots": [1795260050, 1795260060],
    "models": {
        "cifar10": {
            "version": "1",
            "score": "grood",
            "target_id_acceptance": 0.95,
            "p_cutoff": 0.045,
            "accepted": [190, 188],
            "deferred": [10, 11],
            "limits": [[0.01, 0.1], [0.01, 0.1]],
            "classes": {"cat": {"accept": 40, "defer": 2}},
            "p_values": [21, 19, 20, 18],
        }
    },
    "stages": {"forward": {"count": 25, "mean_ms": 6.1, "p50_ms": 5.9, "p95_ms": 7.4}},
    "queue": {"depth": 3, "capacity": 512},
    "rejected_since_start": {"queue_full": 0, "bad_image": 2},
    "grafana_url": "",
}
_METADATA: dict[str, Any] = {
    "name": "cifar10",
    "versions": ["1"],
    "platform": "oodgate",
    "inputs": [
        {"name": "image_bytes", "datatype": "BYTES", "shape": [-1]},
        {"name": "image", "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
    ],
    "outputs": [
        {"name": "decision", "datatype": "BYTES", "shape": [-1]},
        {"name": "p_value", "datatype": "FP64", "shape": [-1]},
    ],
}
_READY = {"name": "cifar10", "ready": True}

ANSWERS: dict[str, Any] = {
    **dict.fromkeys(("verdict", "model_verdict", "version_verdict"), _VERDICT),
    **dict.fromkeys(("explain", "model_explain", "version_explain"), _EXPLAINED),
    "list_models": {"models": [_CARD]},
    **dict.fromkeys(("get_model", "put_policy", "oip_load"), _CARD),
    "get_policy": _POLICY,
    **dict.fromkeys(("get_drift", "reset_drift"), _DRIFT),
    "get_report": _REPORT,
    "monitor": _MONITOR,
    "live": {"live": True},
    "ready": {"ready": True, "live": True},
    "oip_server": {"name": "oodgate", "version": "0.1.0", "extensions": ["model_repository", "binary_tensor_data"]},
    "oip_models": {"models": ["cifar10"]},
    **dict.fromkeys(("oip_model", "oip_version"), _METADATA),
    **dict.fromkeys(("oip_model_ready", "oip_version_ready"), _READY),
    "oip_repository_index": [{"name": "cifar10", "version": "1", "state": "READY", "reason": ""}],
    "oip_unload": {"name": "cifar10", "state": "UNAVAILABLE"},
}
BODIES: dict[str, Any] = {
    "put_policy": _POLICY,
    "reset_drift": {"test": "all"},
    "oip_load": {"parameters": {"version": "1"}},
}
