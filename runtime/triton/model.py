"""The decoding loop as a model of NVIDIA Triton's Python backend; copied into the repository.

Triton needs a Python with `cspd[cpu]` installed. The bundle lies beside this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# Exists inside a Triton server only.
import triton_python_backend_utils as pb_utils

from cspd.engines.errors import CspdError
from cspd.engines.words import speaking
from cspd.runtime.config import RunConfig
from cspd.runtime.pipeline import GeneratedImage, Pipeline
from cspd.runtime.sessions import Sessions
from cspd.runtime.settings import configure, usable_bundle, without_measuring
from cspd.runtime.triton.config import SETTINGS


class TritonPythonModel:
    """Generates the images of one request at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle; `args` are Triton's."""
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._max_images = int(settings["max_images"])
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        device = "cuda" if args["model_instance_kind"] == "GPU" else "cpu"
        self._bundle = usable_bundle(folder)
        self._pipeline = Pipeline(
            Sessions(self._bundle, settings["backend"], device, int(settings["threads"]))
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; what the client can fix comes back as an error of its own."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            with speaking("python"):  # inputs have the names of RunConfig
                config = self._config(request)
                images = [image for batch, _ in self._pipeline.generate(config) for image in batch]
        except CspdError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse(output_tensors=self._outputs(config, images))

    def _config(self, request: Any) -> RunConfig:
        """The request over the bundle's defaults; CspdError for what is out of bounds."""
        chosen = {name: _scalar(request, name) for name in SETTINGS}
        labels = pb_utils.get_input_tensor_by_name(request, "labels").as_numpy()
        if labels.ndim != 1 or not 1 <= labels.size <= self._max_images:
            raise CspdError(f"labels: {list(labels.shape)}, expected [1..{self._max_images}]")
        chosen["backend"] = self._pipeline.backend
        config = configure(self._bundle, labels.tolist(), chosen)
        return self._pipeline.resolve(without_measuring(config, self._bundle))[0]

    def _outputs(self, config: RunConfig, images: list[GeneratedImage]) -> list[Any]:
        """Pixels [N, H, W, C] uint8, counts of drafted tokens [N] int64, the settings as JSON."""
        counts = {
            name: np.array([getattr(image.verdicts, name) for image in images], dtype=np.int64)
            for name in ("proposed", "accepted")
        }
        record = {"config": config.model_dump(mode="json"), "bundle": self._bundle.sha256}
        return [
            pb_utils.Tensor("images", np.stack([image.pixels for image in images])),
            *(pb_utils.Tensor(name, value) for name, value in counts.items()),
            pb_utils.Tensor("config", np.array([json.dumps(record).encode()], dtype=np.object_)),
        ]


def _scalar(request: Any, name: str) -> Any:
    """The setting `name` of the request as a Python value, None where it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    values = tensor.as_numpy()
    if values.size != 1:
        raise CspdError(f"{name}: {list(values.shape)}, expected [1]")
    value = values.reshape(-1)[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else value.item()
