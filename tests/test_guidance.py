"""Guidance: every form against its formula, the rows it asks, and forms side by side in an engine."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from sfumato.diffusion.guidance import (
    Ask,
    ClassifierFree,
    During,
    Guidance,
    Mimicked,
    Moment,
    Options,
    Perturbed,
    Reply,
    Rescaled,
    SelfAttention,
    Thresholded,
    Weighted,
    Window,
    moment,
    plan,
)
from sfumato.diffusion.guidance.attention import blur_salient, gaussian_blur
from sfumato.diffusion.guidance.protocol import after
from sfumato.engine import Engine, Run
from sfumato.families import Model
from sfumato.tasks import scenes, txt2img
from sfumato.tasks.checks import complete
from sfumato.types import Answer, Cond, Job, NetState, Query
from sfumato.weights.checkpoint import load_model
from tests.test_engine import assert_same, network_calls, plain
from tests.test_guidance_peers import randn, strong

SIGMAS = [9.0, 5.0, 2.0, 0.5, 0.0]
JOB = Job("a red apple", "a dog", sampler="euler", steps=4, guidance=3.0, seed=1)


def cond(seed: int) -> Cond:
    return Cond(randn(1, 3, 2, seed=seed))


def at(sigma: float = 2.0, step: int = 0, num_steps: int = 10, x: Tensor | None = None) -> Moment:
    return Moment(step, sigma, step / num_steps, torch.zeros(2, 4, 3, 5) if x is None else x)


def replies(*seeds: int, shape: Sequence[int] = (2, 4, 3, 5)) -> list[Reply]:
    return [Reply(randn(*shape, seed=seed)) for seed in seeds]


def answer(guidance: Guidance, when: Moment, given: Sequence[Reply]) -> Answer:
    found = guidance.combine(when, given)
    assert isinstance(found, Answer)
    return found


# -- where a run stands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sigma, step",
    [(9.0, 0), (8.9, 0), (5.000001, 1), (5.0, 1), (4.999999, 1), (2.1, 1), (1.0, 2), (0.5, 3), (0.1, 3), (11.0, 0)],
)
def test_the_step_is_the_last_level_not_below(sigma: float, step: int) -> None:
    x = torch.zeros(1, 4, 2, 2)
    assert moment(Query(x, sigma), SIGMAS) == Moment(step, sigma, step / 4, x)


def test_a_schedule_that_ends_above_zero_has_no_step_more() -> None:
    assert moment(Query(torch.zeros(1, 4, 2, 2), 0.5), SIGMAS[:-1]).step == 2


# -- classifier-free guidance -----------------------------------------------------------------------------------------


def test_classifier_free_guidance_is_its_formula() -> None:
    """Ho & Salimans 2022, equation 6, with w = scale - 1: it extrapolates from the negative to the positive."""
    positive, negative = cond(1), cond(2)
    given = replies(3, 4)
    guidance = ClassifierFree(positive, negative, 7.5)
    assert list(guidance.rows(at())) == [positive, negative]
    found = guidance.combine(at(), given)
    torch.testing.assert_close(found.x0, 7.5 * given[0].x0 - 6.5 * given[1].x0)
    assert found.uncond is given[1].x0 and found.cond is given[0].x0
    for off in (ClassifierFree(positive, negative, 1.0), ClassifierFree(positive, None, 7.5)):
        assert list(off.rows(at())) == [positive]
        assert off.combine(at(), given[:1]) == Answer(given[0].x0, None, given[0].x0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_several_parts_are_their_formula(scale: float) -> None:
    """Liu et al. 2022, as A1111's AND: every part pulls from the negative with its own weight."""
    guidance = ClassifierFree([Weighted(cond(1), 0.7), Weighted(cond(2), -0.4), Weighted(cond(3))], cond(4), scale)
    assert len(guidance.rows(at())) == 4  # at scale 1, too: the weights do not sum to 1
    given = replies(1, 2, 3, 4)
    p, q, r, n = (reply.x0 for reply in given)
    found = guidance.combine(at(), given)
    torch.testing.assert_close(found.x0, n + scale * (0.7 * (p - n) - 0.4 * (q - n) + (r - n)))
    torch.testing.assert_close(found.cond, replace(guidance, scale=1.0).combine(at(), given).x0)


@pytest.mark.parametrize(
    "weights, shares",
    [((1, 1), (0.5, 0.5)), ((3, 1), (0.75, 0.25)), ((2, -1), (2, -1)), ((2, -3), (1, 0)), ((-1, -2), (1, 0))],
)
def test_parts_without_a_negative_are_their_mean(weights: Sequence[float], shares: Sequence[float]) -> None:
    parts = [Weighted(cond(index), weight) for index, weight in enumerate(weights)]
    given = replies(1, 2)
    found = ClassifierFree(parts, None, 7.0).combine(at(), given)
    torch.testing.assert_close(found.x0, shares[0] * given[0].x0 + shares[1] * given[1].x0)


def test_a_part_of_weight_one_is_a_plain_prompt() -> None:
    given = replies(1, 2)
    plain, part = (ClassifierFree(told, cond(2), 4.0) for told in (cond(1), [Weighted(cond(1))]))
    assert torch.equal(plain.combine(at(), given).x0, part.combine(at(), given).x0)
    with pytest.raises(ValueError, match=r"^positive=\(\): "):
        ClassifierFree([], cond(2), 4.0).rows(at())


def test_timelines_change_what_is_told() -> None:
    a, b, c, n, m = (cond(seed) for seed in range(5))
    guidance = ClassifierFree(
        [Weighted([(2, a), (5, b)], 0.5), Weighted(c, 0.5)],
        [(3, n), (4, m)],
        3.0,
    )
    told = [guidance.rows(at(step=step)) for step in range(8)]
    assert [rows[0] is b for rows in told] == [step >= 2 for step in range(8)] != [rows[0] is a for rows in told]
    assert [rows[2] is m for rows in told] == [step >= 3 for step in range(8)] != [rows[2] is n for rows in told]
    assert all(rows[1] is c for rows in told)
    assert ClassifierFree([(1, a), (2, b)], None, 1.0).rows(at(step=1)) == [b]


# -- the window -------------------------------------------------------------------------------------------------------


def test_the_window_is_open_below_and_closed_above() -> None:
    """Kynkäänniemi et al. 2024."""
    window = Window(lo=1.0, hi=4.0)
    assert [window.holds(at(sigma)) for sigma in (4.1, 4.0, 1.1, 1.0)] == [False, True, True, False]


def test_the_window_in_steps_and_every_second_step() -> None:
    window = Window(start=0.2, end=0.5)
    assert [step for step in range(10) if window.holds(at(step=step))] == [2, 3, 4]
    thin = Window(thin_below=3.0)
    assert [step for step in range(6) if thin.holds(at(2.9, step))] == [0, 2, 4]
    assert all(thin.holds(at(3.0, step)) for step in range(6))


@pytest.mark.parametrize(
    "fields", [{"lo": -1.0}, {"lo": 3.0, "hi": 3.0}, {"start": 0.5, "end": 0.5}, {"end": 1.1}, {"thin_below": -1.0}]
)
def test_an_empty_window_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Window(**fields)


def test_outside_the_window_another_plan_answers() -> None:
    inside = ClassifierFree(cond(1), cond(2), 3.0)
    outside = ClassifierFree(cond(1), None, 1.0)
    guidance = During(Window(lo=1.0), inside, outside)
    given = replies(1, 2)
    assert len(guidance.rows(at(2.0))) == 2 and len(guidance.rows(at(1.0))) == 1
    assert torch.equal(answer(guidance, at(2.0), given).x0, inside.combine(at(), given).x0)
    assert answer(guidance, at(1.0), given[:1]).x0 is given[0].x0


# -- taming -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.1, 3.0, 14.0])
@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_rescaling_is_diffusers(prediction: str, phi: float, sigma: float) -> None:
    """Predictions are made into x0 by their definitions; what diffusers rescales is the prediction itself."""
    alpha = (1 + sigma**2) ** -0.5
    x = (1 + sigma**2) ** 0.5 * randn(2, 4, 3, 5)
    text, uncond = randn(2, 4, 3, 5, seed=1), 1.5 * randn(2, 4, 3, 5, seed=2)

    def x0(out: Tensor) -> Tensor:
        return x - sigma * out if prediction == "eps" else alpha * (alpha * x) - sigma * alpha * out

    guided = uncond + 7.5 * (text - uncond)
    expected = x0(rescale_noise_cfg(guided, text, guidance_rescale=phi))
    guidance = Rescaled(ClassifierFree(cond(1), cond(2), 7.5), phi, prediction)
    found = answer(guidance, at(sigma, x=x), [Reply(x0(text)), Reply(x0(uncond))])
    assert_same(found.x0, expected)
    assert torch.equal(found.uncond, x0(uncond))


def test_without_guidance_nothing_is_rescaled() -> None:
    given = replies(1)
    guidance = Rescaled(ClassifierFree(cond(1), None, 1.0), 1.0, "eps")
    assert answer(guidance, at(x=randn(2, 4, 3, 5)), given).x0 is given[0].x0
    with pytest.raises(ValueError, match="^prediction='x0'"):
        plan(cond(1), None, Options(), "x0")


def test_dynamic_thresholding_is_diffusers() -> None:
    """Saharia et al. 2022: the scheduler's own, which bounds s from above as well, here by a number that is far."""
    scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1e6)
    x0 = 3 * randn(3, 4, 8, 8) * torch.tensor([0.1, 1.0, 5.0])[:, None, None, None]
    guidance = Thresholded(ClassifierFree(cond(1), None, 1.0), percentile=0.9)
    found = answer(guidance, at(), [Reply(x0)]).x0
    assert_same(found, scheduler._threshold_sample(x0))
    assert torch.equal(found[0].abs() <= 1, torch.ones_like(found[0], dtype=torch.bool))
    wide = answer(replace(guidance, limit=4.0), at(), [Reply(x0)]).x0
    assert float(wide.abs().max()) == pytest.approx(4.0)
    assert_same(wide[:1], x0[:1])  # within the limit: as it was


def test_the_range_of_a_smaller_scale() -> None:
    """As large as the mimicked answer in each channel of each picture, about the guided one's mean."""
    given = [Reply(randn(2, 4, 8, 8, seed=1) + 1), Reply(randn(2, 4, 8, 8, seed=2))]
    inner = ClassifierFree(cond(1), cond(2), 20.0)
    found = answer(Mimicked(inner, mimic=5.0), at(), given).x0
    guided, meek = (replace(inner, scale=scale).combine(at(), given).x0 for scale in (20.0, 5.0))

    def centred(x0: Tensor) -> Tensor:
        return x0 - x0.mean(dim=(2, 3), keepdim=True)

    factor = centred(meek).abs().amax((2, 3), keepdim=True) / centred(guided).abs().amax((2, 3), keepdim=True)
    torch.testing.assert_close(found, guided.mean(dim=(2, 3), keepdim=True) + centred(guided) * factor)
    for percentile in (1.0, 0.5):  # what is no larger than the mimicked answer stays
        assert_same(answer(Mimicked(inner, mimic=20.0, percentile=percentile), at(), given).x0, guided)
    clipped = answer(Mimicked(inner, mimic=5.0, percentile=0.9), at(), given).x0
    bounds = centred(meek).abs().amax((2, 3))
    assert (clipped - guided.mean(dim=(2, 3), keepdim=True)).abs().amax((2, 3)).allclose(bounds)
    assert ((clipped - clipped.amax((2, 3), keepdim=True)).abs() < 1e-5).sum() > found.shape[0] * found.shape[1]
    off = ClassifierFree(cond(1), None, 1.0)
    assert answer(Mimicked(off), at(), given[:1]).x0 is given[0].x0


# -- attention --------------------------------------------------------------------------------------------------------


def test_perturbed_attention_asks_a_row_for_each_part() -> None:
    parts = [Weighted(cond(1), 0.7), Weighted([(1, cond(2)), (9, cond(3))], 0.5)]
    guidance = Perturbed(ClassifierFree(parts, cond(4), 5.0), parts, 2.0, ("middle_block", "output_blocks.1"))
    rows = guidance.rows(at(step=3))
    assert [row.state for row in rows[:3]] == [None] * 3
    state = NetState(perturbed=("middle_block", "output_blocks.1"))
    assert [row.state for row in rows[3:]] == [state] * 2
    assert rows[4].context is rows[1].context is parts[1].told[1][1].context
    given = replies(1, 2, 3, 4, 5)
    p, q, n, worse_p, worse_q = (reply.x0 for reply in given)
    expected = n + 5 * (0.7 * (p - n) + 0.5 * (q - n)) + 2 * (0.7 * (p - worse_p) + 0.5 * (q - worse_q))
    torch.testing.assert_close(answer(guidance, at(step=3), given).x0, expected)


def test_blur_salient_blurs_where_attention_is() -> None:
    x0 = randn(1, 4, 8, 12)
    attention = torch.full((1, 2, 6, 6), 1 / 6)
    attention[:, :, :, 1] += 0.1
    attention[:, :, :, 2] -= 0.1
    blurred = blur_salient(x0, attention)  # a map of 2 x 3 cells
    expected = x0.clone()
    expected[:, :, :4, 4:8] = gaussian_blur(x0)[:, :, :4, 4:8]
    assert torch.equal(blurred, expected)
    assert not torch.equal(blurred, x0)
    assert gaussian_blur(x0[:, :, :1, :2]).shape == (1, 4, 1, 2)  # smaller than the kernel
    flat = gaussian_blur(torch.ones(1, 4, 6, 6))
    torch.testing.assert_close(flat, torch.ones(1, 4, 6, 6))


def test_a_second_question_goes_through_the_plans_around_it() -> None:
    given = [
        Reply(reply.x0, torch.eye(4)[None, None].expand(2, 2, -1, -1)) for reply in replies(1, 2, shape=(2, 4, 4, 4))
    ]
    inner = ClassifierFree(cond(1), cond(2), 3.0)
    bare, around = SelfAttention(inner), Thresholded(SelfAttention(inner))
    when = at(x=randn(2, 4, 4, 4, seed=9))
    rows = bare.rows(when)
    assert [row.state for row in rows] == [NetState(probe="middle_block")] * 2
    ask, asked_around = bare.combine(when, given), around.combine(when, given)
    assert isinstance(ask, Ask) and isinstance(asked_around, Ask)
    assert list(ask.rows) == [inner.negative]
    second = replies(7, shape=(2, 4, 4, 4))
    found = ask.then(second)
    assert isinstance(found, Answer)
    expected = Thresholded(ClassifierFree(cond(1), None, 1.0)).combine(when, [Reply(found.x0)])
    assert isinstance(expected, Answer)
    assert torch.equal(asked_around.then(second).x0, expected.x0)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="brought no attention map"):
        bare.combine(when, replies(1, 2))


def test_after_waits_for_the_answer() -> None:
    last = Answer(torch.ones(1))
    ask = Ask(torch.zeros(1), [], lambda _: Ask(torch.zeros(1), [], lambda _: last))
    found = after(ask, lambda answer: replace(answer, x0=answer.x0 + 1))
    while isinstance(found, Ask):
        found = found.then([])
    assert float(found.x0) == 2.0


# -- in the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Model:
    model = load_model(tiny_checkpoint)
    strong(model.unet)
    return model


def start(model: Model, job: Job = JOB, change: Callable[[ClassifierFree], Guidance] | None = None) -> Run:
    run = txt2img.start(complete(job, model.family), model)
    if change:
        run.guidance = change(plain(run))
    return run


def told(model: Model, prompt: str) -> Cond:
    """What the tiny model is told of a prompt."""
    positive = plain(start(model, replace(JOB, prompt=prompt))).positive
    assert isinstance(positive, Cond)
    return positive


def with_options(**fields: object) -> Callable[[ClassifierFree], Guidance]:
    return lambda base: plan(base.positive, base.negative, Options(base.scale, **fields), "eps")


def drive(model: Model, *runs: Run) -> tuple[list[Tensor], list[int]]:
    with network_calls(model) as rows:
        return Engine(model).drive(list(runs)), rows


FORMS: dict[str, Callable[[ClassifierFree], Guidance]] = {
    "plain": lambda base: base,
    "window": with_options(window=Window(start=0.25, end=0.75)),
    "thin": with_options(window=Window(thin_below=math.inf)),
    "rescaled": with_options(rescale=0.7),
    "pag": with_options(pag=3.0),
    "sag": with_options(sag=0.75),
    "freeu": with_options(freeu=(1.2, 1.4, 0.9, 0.2)),
    "mimic": with_options(mimic=2.0, percentile=0.99),
    "threshold": with_options(percentile=0.9),
    "everything": with_options(
        window=Window(end=0.5), rescale=0.5, pag=2.0, sag=1.0, freeu=(1.1, 1.2, 0.9, 0.5), mimic=1.5
    ),
}
ROWS = {  # of each network call of four steps of one picture
    "plain": [2] * 4,
    "window": [1, 2, 2, 1],
    "thin": [2, 1, 2, 1],
    "pag": [2, 1] * 4,
    "sag": [2, 1] * 4,
    "everything": [2, 1, 1] * 2 + [1, 1, 1] * 2,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_draws_another_picture_and_asks_its_rows(model: Model, name: str) -> None:
    [found], rows = drive(model, start(model, change=FORMS[name]))
    [plain], _ = drive(model, start(model))
    assert rows == ROWS.get(name, [2] * 4)
    assert found.isfinite().all()
    assert (name == "plain") == torch.allclose(found, plain, rtol=1e-3, atol=1e-3)


def test_runs_of_all_forms_together_equal_runs_alone(model: Model) -> None:
    def maker(seed: int, form: Callable[[ClassifierFree], Guidance]) -> Callable[[], Run]:
        job = replace(JOB, seed=seed, count=1 + seed % 2, sampler=("euler", "heun")[seed % 2])
        return lambda: start(model, job, form)

    made = [maker(seed, form) for seed, form in enumerate(FORMS.values())]
    together, shared = drive(model, *(make() for make in made))
    alone = [drive(model, make()) for make in made]
    for one, ([other], _) in zip(together, alone, strict=True):
        assert_same(one, other)
    assert sum(shared) == sum(sum(rows) for _, rows in alone)
    assert len(shared) < 0.6 * sum(len(rows) for _, rows in alone)


def test_states_of_their_own_change_no_other_run(model: Model) -> None:
    [plain], _ = drive(model, start(model))
    with_others, _ = drive(model, start(model, change=FORMS["freeu"]), start(model), start(model, change=FORMS["pag"]))
    assert_same(with_others[1], plain)


def test_a_prompt_of_two_parts_in_the_engine(model: Model) -> None:
    """Two halves of one prompt are that prompt; two prompts are neither of them."""
    same = [Weighted(told(model, JOB.prompt), 0.5)] * 2
    both = [Weighted(told(model, JOB.prompt)), Weighted(told(model, "a tree"), 0.5)]
    [plain], _ = drive(model, start(model))
    [halves], rows = drive(model, start(model, change=lambda base: replace(base, positive=same)))
    [other], _ = drive(model, start(model, change=lambda base: replace(base, positive=both)))
    assert rows == [3] * 4
    assert_same(halves, plain)
    assert not torch.allclose(other, plain, atol=1e-2)


@pytest.mark.parametrize("sampler, steps", [("euler", 4), ("heun", 4), ("dpmpp_2s_a", 4)])
def test_a_timeline_in_the_engine(model: Model, sampler: str, steps: int) -> None:
    """Until the change the pictures are those of the first prompt, query by query, and then no longer."""
    job = replace(JOB, sampler=sampler, steps=steps)
    line = [(2, told(model, JOB.prompt)), (steps, told(model, "a tree"))]
    seen: dict[str, list[tuple[float, Tensor]]] = {"plain": [], "edited": []}
    for name, change in (("plain", None), ("edited", lambda base: replace(base, positive=line))):
        run = start(model, job, change)
        run.watch = lambda query, answer, name=name: seen[name].append((query.sigma, answer.x0))
        drive(model, run)
    switch = scenes.sigmas_of(complete(job, model.family), model)[2]
    pairs = list(zip(seen["plain"], seen["edited"], strict=True))
    before = [torch.equal(one, other) for (sigma, one), (_, other) in pairs if sigma > switch * 1.000001]
    others = [torch.allclose(one, other, atol=1e-3) for (sigma, one), (_, other) in pairs if sigma <= switch * 1.000001]
    assert len(before) >= 2 and all(before)
    assert len(others) >= 2 and not any(others)


def test_timelines_of_one_prompt_are_that_prompt(model: Model) -> None:
    def change(base: ClassifierFree) -> ClassifierFree:
        return replace(base, positive=[(2, base.positive), (4, base.positive)], negative=[(1, base.negative)])

    assert_same(drive(model, start(model, change=change))[0][0], drive(model, start(model))[0][0])


# -- what is not finite -----------------------------------------------------------------------------------------------


def breaking_at(step: int) -> Callable[[ClassifierFree], Guidance]:
    """The prompt is not a number from a step on, counted from 1."""

    def change(base: ClassifierFree) -> ClassifierFree:
        assert isinstance(base.positive, Cond)
        broken = Cond(base.positive.context * math.nan)
        return replace(base, positive=[(step - 1, base.positive), (99, broken)])

    return change


def test_an_answer_that_is_not_finite_ends_the_run_and_says_where(model: Model) -> None:
    run = start(model, change=breaking_at(3))
    sigma = scenes.sigmas_of(complete(JOB, model.family), model)[2]
    with pytest.raises(
        ValueError, match="^precision='float32': the network's answer is not finite at step 3 of 4 "
    ) as told:
        drive(model, run)
    assert f"(sigma {sigma:.3g})" in str(told.value)
    assert run.error is told.value and run.result is None and run.query is None


def test_it_ends_no_other_run(model: Model) -> None:
    broken, sound = start(model, change=breaking_at(2)), start(model, replace(JOB, seed=2))
    with network_calls(model) as rows, pytest.raises(ValueError, match="step 2 of 4"):
        Engine(model).drive([broken, sound])
    assert rows == [4, 4, 2, 2]
    assert sound.error is None
    assert sound.result is not None
    assert_same(sound.result, drive(model, start(model, replace(JOB, seed=2)))[0][0])


def test_a_call_that_fails_ends_the_runs_in_it(model: Model) -> None:
    lost = start(model, change=with_options(pag=3.0, pag_blocks=("nowhere",)))
    sound = start(model)
    with pytest.raises(ValueError, match="^block='nowhere'"):
        Engine(model).drive([lost, sound])
    assert lost.result is None and sound.error is None and sound.result is not None


def test_a_watch_that_fails_ends_its_run(model: Model) -> None:
    def watch(query: Query, answer: Answer) -> None:
        raise KeyError("mine")

    lost, sound = start(model), start(model)
    lost.watch = watch
    with pytest.raises(KeyError, match="mine"):
        Engine(model).drive([lost, sound])
    assert sound.result is not None


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"scale": math.nan}, "scale=nan"),
        ({"pag": math.inf}, "pag=inf"),
        ({"rescale": 1.1}, "rescale=1.1: from 0 to 1"),
        ({"percentile": 0.0}, "percentile=0.0"),
        ({"freeu": (1.0, 1.0, 0.0, 1.0)}, r"freeu=\(1.0, 1.0, 0.0, 1.0\)"),
    ],
)
def test_options_out_of_range_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Options(**fields)


def test_no_options_are_classifier_free_guidance() -> None:
    assert isinstance(plan(cond(1), cond(2), Options(3.0), "eps"), ClassifierFree)
