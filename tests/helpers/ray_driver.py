"""Work for a Ray cluster, a job a line of JSON on standard input: [function, arguments, options];
one connection for all."""

from __future__ import annotations

import json
import sys

from genrec_shards.prepare import prepare
from genrec_shards.ray_engine import clean_log as engine_module
from genrec_shards.ray_engine.log_spans import Sizes
from genrec_shards.ray_engine.shard_tasks import write_shards_on_ray
from genrec_shards.ray_engine.tasks import connected

FUNCTIONS = {"prepare": prepare, "shard": write_shards_on_ray}

if __name__ == "__main__":
    engine_module.SIZES = Sizes(*json.loads(sys.argv[2]))
    with connected(sys.argv[1]):
        print("connected", flush=True)
        for line in sys.stdin:
            name, arguments, options = json.loads(line)
            try:
                FUNCTIONS[name](*arguments, **options)
                print("done", flush=True)
            except ValueError as error:
                print(f"failed: {error}", flush=True)
