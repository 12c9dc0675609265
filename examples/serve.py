"""Serve a model, and ask it twice as any OpenAI client does: steered and as it is.

python examples/serve.py --plan runs/example/plan -p "The bridge is closed on Monday."
"""

import argparse
import json
from collections.abc import Sequence
from urllib.request import Request, urlopen

from saesteer.sae import load_model
from saesteer.steering.serving.config import ServeConfig
from saesteer.steering.serving.routes.api import SteeringApp
from saesteer.steering.serving.routes.server import in_background
from saesteer.steering.serving.routes.shelf import Shelf


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--plan", default="runs/example/plan", help="folder that rank wrote")
    parser.add_argument("-p", "--prompt", default="The bridge is closed on Monday.")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args(argv)

    lm = load_model(args.model)
    config = ServeConfig(port=0)  # a port that is free
    app = SteeringApp(lm, Shelf(lm, {"example": args.plan}), config, name="model")
    with in_background(app.app(), config) as url:
        print(f"serving at {url}")
        for steer in ([], [{"plan": "example"}]):
            body = {
                "model": "model",
                "messages": [{"role": "user", "content": args.prompt}],
                "max_tokens": args.max_new_tokens,
                "temperature": 0,
                "steer": steer,
            }
            request = Request(
                f"{url}/v1/chat/completions",
                data=json.dumps(body).encode(),
                headers={"content-type": "application/json"},
            )
            with urlopen(request) as response:
                choice = json.load(response)["choices"][0]
            kind = "steered" if steer else "unsteered"
            print(f"{kind}: {choice['message']['content']}")
            print(f"touched {choice['steering']['tokens_touched']} positions")


if __name__ == "__main__":
    main()
