"""Other projects' way of asking a remote policy, timed from outside: openpi's websocket client, LeRobot's async server.

Knows their protocols well enough to serve a policy that does nothing. Each runs in an environment of its own, because
their pins are not ours, and prints the seconds of every request and answer.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import venv
from pathlib import Path

from benchmarks.harness.ros_probe import ROOT

OPENPI = "openpi-client==0.1.2"
CLIENT = """
import json, sys, threading, time
import numpy as np
from websockets.sync.server import serve
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
width, height, steps = map(int, sys.argv[1:4])
if sys.argv[4] == "server":
    def handle(connection):
        connection.send(msgpack_numpy.packb({}))
        actions = np.zeros((8, 6), np.float32)
        for message in connection:
            msgpack_numpy.unpackb(message)
            connection.send(msgpack_numpy.packb({"actions": actions}))
    with serve(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(server.socket.getsockname()[1], flush=True)
        server.serve_forever()
client = WebsocketClientPolicy("127.0.0.1", int(sys.argv[5]))
generator = np.random.default_rng(0)
seen = {f"camera{i}": generator.integers(0, 256, (height, width, 3), np.uint8) for i in range(2)}
seen |= {"state": np.zeros(6, np.float32), "prompt": "move"}
seconds = []
for _ in range(steps + 20):
    began = time.perf_counter()
    client.infer(seen)
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds[20:]), flush=True)
"""
LEROBOT = """
import json, logging, pickle, sys, time
from concurrent import futures
import grpc
import numpy as np
import torch
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import TimedObservation
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import grpc_channel_options, send_bytes_in_chunks
logging.disable(logging.CRITICAL)
torch.set_num_threads(1)
width, height, steps = map(int, sys.argv[1:4])
names = [f"joint{i}" for i in range(6)]
if sys.argv[4] == "server":
    shape = {f"observation.images.camera{i}": (3, height, width) for i in range(2)}
    class Nothing:
        class config:
            image_features = {k: PolicyFeature(FeatureType.VISUAL, s) for k, s in shape.items()}
        def predict_action_chunk(self, batch):
            return torch.zeros(1, 8, 6)
    server = PolicyServer(PolicyServerConfig(host="127.0.0.1", port=1, inference_latency=0.0))
    server.policy, server.actions_per_chunk, server.device = Nothing(), 8, "cpu"
    server.preprocessor = server.postprocessor = lambda x: x
    server.lerobot_features = {k: {"dtype": "image", "shape": (height, width, 3), "names": ["height", "width",
        "channels"]} for k in shape} | {"observation.state": {"dtype": "float32", "shape": (6,), "names": names}}
    running = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(server, running)
    print(running.add_insecure_port("127.0.0.1:0"), flush=True)
    running.start()
    running.wait_for_termination()
stub = services_pb2_grpc.AsyncInferenceStub(grpc.insecure_channel(f"127.0.0.1:{sys.argv[5]}", grpc_channel_options()))
stub.Ready(services_pb2.Empty())
generator = np.random.default_rng(0)
seen = {f"camera{i}": generator.integers(0, 256, (height, width, 3), np.uint8) for i in range(2)}
seen |= dict.fromkeys(names, 0.0) | {"task": "move"}
seconds = []
for number in range(steps + 20):
    began = time.perf_counter()
    data = pickle.dumps(TimedObservation(timestamp=time.time(), timestep=number, observation=seen, must_go=True))
    stub.SendObservations(send_bytes_in_chunks(data, services_pb2.Observation, silent=True))
    answer = stub.GetActions(services_pb2.Empty())
    actions = pickle.loads(answer.data)
    seconds.append(time.perf_counter() - began)
    assert len(actions) == 8
print(json.dumps(seconds[20:]), flush=True)
"""


def openpi(width: int, height: int, steps: int) -> list[float] | None:
    """The same through openpi's client; None where it does not install."""
    folder = ROOT / "runs" / "bench" / "openpi"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", OPENPI, "typing_extensions"]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        return None
    return _timed(python, CLIENT, width, height, steps)


def lerobot(python: str, width: int, height: int, steps: int) -> list[float]:
    """The same through LeRobot's async server. python: of an environment with lerobot and grpcio."""
    return _timed(Path(python), LEROBOT, width, height, steps)


def version(python: str) -> str:
    """Of the LeRobot in that environment."""
    code = "from importlib import metadata; print(metadata.version('lerobot'))"
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def _timed(python: Path, code: str, width: int, height: int, steps: int) -> list[float]:
    """Run the code as a server and as its client."""
    asked = [str(python.absolute()), "-c", code, str(width), str(height), str(steps)]
    with (
        tempfile.TemporaryDirectory() as folder,  # a server may write its logs where it stands
        subprocess.Popen(
            [*asked, "server"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server,
    ):
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        done = subprocess.run([*asked, "client", port], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        server.kill()
        server.wait()
    seconds: list[float] = json.loads(done.stdout)
    return seconds
