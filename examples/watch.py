"""Look on while a picture is drawn: how far the belief moves at each step.

python examples/watch.py
"""

from __future__ import annotations

from sfumato import Pipeline
from sfumato.engine import Run
from sfumato.tasks.scenes import Scene
from sfumato.types import Answer, Job, Query


def main(steps: int = 20) -> list[float]:
    """Print sigma and how far x0 moved at each step; returns those distances, root mean square of the latents."""
    moves: list[float] = []

    def observe(run: Run, scene: Scene, which: slice) -> None:
        last = None

        def watch(query: Query, answer: Answer) -> None:
            nonlocal last
            if last is not None:
                moves.append(float((answer.x0 - last).square().mean().sqrt()))
                print(f"sigma {query.sigma:8.3f}   x0 moved by {moves[-1]:.4f}")
            last = answer.x0

        run.watch = watch

    job = Job(prompt="a red apple on a blue background", seed=2, steps=steps, sampler="euler", schedule="karras")
    Pipeline.from_pretrained().draw(job, observe=observe)
    return moves


if __name__ == "__main__":
    main()
