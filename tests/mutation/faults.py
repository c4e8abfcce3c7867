"""Faults planted by hand, of the kind that a tired engineer makes: text for text, one at a time.

Each file has the tests that should notice, and pairs of what stands there and what would be wrong.
Where the code moved on, ``mutants.py`` says "gone": write the fault anew or take it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``old``, which the file holds once, replaced by ``new``; tests: those of the place."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


SELECTION = ("selection",)
AUDITION = ("selection/test_auditioning.py",)
TAP = ("test_tap.py", "test_layouts.py", *SELECTION)
OPTIMIZER = ("training/test_optim.py", "training/test_torch_optimizer.py")
OPTIM = (*OPTIMIZER, "ops/test_bias_adamw_step.py")
ROWS = ("ops/test_bias_grad_stats.py", "ops/test_bias_example_grads.py")
STATS = (*ROWS, "ops/test_cuda_sources.py")
CUDA = ("ops/test_cuda_sources.py",)
TRITON = ("ops/test_triton.py", "ops/test_triton_steps.py", "ops/test_bias_adamw_step.py")
ADAPTERS = ("adapters",)
MODELS = (
    "models/test_models.py",
    "models/test_registry.py",
    "models/test_wrappers.py",
    "training/test_preparation.py",
)
TUNING = ("training/test_tuning.py",)
PREPARATION = ("training/test_preparation.py", "adapters/test_adapters.py")

Pairs = list[tuple[str, str]]
PLACES: dict[str, tuple[tuple[str, ...], Pairs]] = {
    "beft_ext/scores.py": (
        ("test_scores.py",),
        [
            ("torch.maximum(b0.dot(b0), b.dot(b))", "torch.minimum(b0.dot(b0), b.dot(b))"),
            ("if not bool(b0.any()) or not bool(b.any())", "if not bool(b0.any())"),
            ("(current.double() - initial.double())", "(current - initial)"),
            ("grad_sum_sq.double().mean() / count)", "grad_sum_sq.double().sum() / count)"),
        ],
    ),
    "beft_ext/training/loss.py": (
        ("training/test_loss.py", *SELECTION),
        [
            ("labels[..., 1:].ne(IGNORED_LABEL).sum()", "labels[..., :-1].ne(IGNORED_LABEL).sum()"),
            ("labels.numel() if labels.is_floating_point()",
             "len(labels) if labels.is_floating_point()"),
            ("places[:, 1:] != places[:, :-1] + 1", "places[:, 1:] != places[:, :-1]"),
            ("return int(ends.diff().gt(0).sum())", "return len(ends) - 1"),
            ("loss.mean() if loss.ndim else loss", "loss.sum() if loss.ndim else loss"),
        ],
    ),
    "beft_ext/training/counted.py": (
        ("training/test_counted.py", "training/test_observed.py"),
        [
            ("found[:, :ahead] = False", "found[:, :1] = False"),
            ("logits[which.roll(-ahead, 1)]", "logits[which]"),
            ("nonzero().flatten() - ahead", "nonzero().flatten() - 1"),
            ("hidden[:, -tokens:]", "hidden[:, :tokens]"),
            ("        handle.remove()\n", "        pass\n"),
            ("with quiet(model), unheard(model), torch", "with quiet(model), torch"),
            ("both.pop() if len(both) == 1 else None", "both.pop()"),
            ("at // tokens * len(kept) + place", "place"),
            (" - top - sums.log()", " - sums.log()"),
            ("grads[row, own[:, column]] += given", "grads[row, own[:, column]] = given"),
        ],
    ),
    "beft_ext/training/observed.py": (
        ("training/test_observed.py", "tasks/test_prompts.py"),
        [
            ("divisor = items_given(batch) or float", "divisor = float"),
            ("self.losses / self.counts.clamp(min=1)", "self.losses / self.counts"),
            ("residuals = outputs - labels", "residuals = labels - outputs"),
            ("best = min(readings, key=off, default=None)", "best = (readings or [None])[0]"),
            ("right.ne(IGNORED_LABEL).to(losses)", "torch.ones_like(losses)"),
        ],
    ),
    "beft_ext/selection/auditioning.py": (
        AUDITION,
        [
            ("        start.again()\n", ""),
            ("        torch.manual_seed(self.seed)\n", ""),
            ("        model.train()\n", ""),
            ("        start.model.eval()\n", ""),
            ("found[places] = losses", "found[:] = losses"),
            ("key=lambda e: (means[e], e[1])", "key=lambda e: means[e]"),
            ("min(int(steps * 2**r), longest)", "int(steps * 2**r)"),
            ("if i not in held]", "]"),
            ("rate * factor)", "rate)"),
        ],
    ),
    "beft_ext/selection/racers.py": (
        AUDITION,
        [
            ("(1 / len(differences) + 1 / trained)", "(1 / len(differences))"),
            ("differences = rival - first", "differences = first - rival"),
            ("r.contender != self.best)", "r.lr != self.lr)"),
            ("max(0.0, 1 - sum(map(_better, rivals)))", "1 - sum(map(_better, rivals))"),
            ("0.5 if rival.behind <= 0 else 0.0", "0.0"),
        ],
    ),
    "beft_ext/tap.py": (
        TAP,
        [
            ("        self.finish_step()\n        step = self._step", "        step = self._step"),
            ("parameter.requires_grad_(required)", "parameter.requires_grad_(True)"),
            ("        state.take(self._model, Tap)", "        pass"),
            ("        hook.remove()\n        self._hooks", "        pass\n        self._hooks"),
            ("site.finish_step(self._step.row)", "site.finish_step(None)"),
            ("            step.gathered = None\n", "            pass\n"),
        ],
    ),
    "beft_ext/listener.py": (
        (*TAP, "test_slab.py"),
        [
            ("scaled = grads * step.scale", "scaled = grads"),
            ("self.grad_sum_sq += self.pending.square().sum(0)",
             "self.grad_sum_sq += self.pending.sum(0).square()"),
            ("else site.pending + scaled", "else scaled"),
            ("            return RECOMPUTED  #", "            pass  #"),
            ("        step.begun = True\n", ""),
            ("        if site.uses < 2:", "        if True:"),
            ("use == STALE or use in self.reduced or", "use == STALE or"),
            (" and site.uses < 2:", ":"),
            ("grad if before is None else before + grad", "grad"),
            ("if grad is not None and self.site.trained():", "if grad is not None:"),
            ("    if output._is_view():\n", "    if False:\n"),
            ("layout.axis == 0 and layout.outer and", "layout.axis == 0 and"),
        ],
    ),
    "beft_ext/slab.py": (
        ("test_slab.py",),
        [
            ("columns < bias.width", "True"),
            ("rows * self.sign, (", "rows, ("),
            ("[:, self.order]", ""),
            ("seed * 1_000_003 + bias.layer", "bias.layer"),
            ("self.whole[row : row + len(grads)] = grads", "self.whole[: len(grads)] = grads"),
            ("[:, :, bias.start : bias.stop]", "[:, :, : bias.stop - bias.start]"),
            ("example_offsets=offsets, scale=scale)", "example_offsets=offsets, scale=1.0)"),
        ],
    ),
    "beft_ext/gains.py": (
        ("test_gains.py",),
        [
            ("among - a_q[ridge, places] @ half[ridge, places].mT", "among"),
            (" - (a_q * half).sum(-1)  #", "  #"),
            ("a_t - half @ (q.T @ a_t)", "a_t"),
            (".argmin())\n    ridge", ".argmax())\n    ridge"),
            ("(1 / n + 1 / (n - 1)) ** 0.5", "(1 / n) ** 0.5"),
            ("each(largest_of, gains)", "each(largest_of, list(gains)[-1:])"),
            ("(1 + int(", "(int("),
            ("gram.values.sqrt() * (", "gram.values * ("),
            ("order[k::number]", "order[::number]"),
        ],
    ),
    "beft_ext/selection/evidence.py": (
        ("selection/test_measuring.py",),
        [
            ("        self.rows += size\n", "        self.rows += size - 1\n"),
            ("            done += 1\n", "            done += 2\n"),
        ],
    ),
    "beft_ext/selection/examples.py": (
        ("selection/test_measuring.py",),
        [
            ("row[own.bool()]", "row"),
            ("at = self.first + int(", "at = int("),
        ],
    ),
    "beft_ext/selection/gain_result.py": (
        ("selection/test_measuring.py",),
        [
            ("(2 * (top + 1 - bottom))", "(2 * (top - bottom))"),
            ("min(min(self.bands[e.term])[0] if", "min(max(self.bands[e.term])[0] if"),
        ],
    ),
    "beft_ext/selection/equations.py": (
        ("selection/test_equations.py", "selection/test_measuring.py"),
        [
            ("weight[:, None] * (p - hot)", "(p - hot)"),
            ("(told / (1 - told)).sqrt()", "told / (1 - told)"),
            ("(logs.shape[1] - 2) ** 0.5", "1.0"),
            ("double().cpu() * roots", "double().cpu()"),
        ],
    ),
    "beft_ext/layouts.py": (
        TAP,
        [
            ("movedim(self.axis + (not self.outer), 0)", "movedim(self.axis, 0)"),
            ("            if size > batch:", "            if False:"),
            ("    other = (example + 1) % batch", "    other = example"),
        ],
    ),
    "beft_ext/training/optim.py": (
        OPTIM,
        [
            ("norm if scale is None else norm / scale.to(norm.device)", "norm"),
            ("torch.float32) for n in norms]).norm()", "torch.float32) for n in norms]).sum()"),
            ('sign = -1.0 if group["maximize"] else 1.0', "sign = 1.0"),
            ('float(group["weight_decay"]), sign)', "0.0, sign)"),
            ("(values.get(\"master\", p))", "(p)"),
            ('views["initial"].copy_(values["initial"])', "pass"),
            ("                del self.param_groups[-1]\n", ""),
            ('found_inf = getattr(self, "found_inf", None)', '"found_inf": None'),
            ("            with torch.enable_grad():\n                loss = closure()",
             "            loss = closure()"),
            ("                    del self.state[flat.params[i]]", "                    pass"),
            ("                if begun:", "                if False:"),
            ("            flat.scores.copy_(scores)", "            pass"),
        ],
    ),
    "beft_ext/training/optim_state.py": (
        OPTIM,
        [
            ('        number("betas", beta, below=1)', '        number("betas", beta)'),
            ('settings.pop("param_names", None)', "pass"),
            ("bool((value < 0).any())", "False"),
        ],
    ),
    "beft_ext/training/flat.py": (
        OPTIM,
        [
            ("at = [group * period + bias.start", "at = [group * width + bias.start"),
            ("float(rows[i, 0]) / width if width", "float(rows[i, 0]) / self.widths[0] if width"),
            ("torch.where(shift + growth > 0, growth / current, (0 - shift) / initial)",
             "growth / current"),
            ("torch.where(master.to(p.dtype) == p, master, p.to(master.dtype))", "master"),
            ("if p.is_neg():\n        return None", "if False:\n        return None"),
            ("            if i in self.odd or (p.dtype in HALF and g.dtype != p.dtype):",
             "            if i in self.odd:"),
            ("p.ndim == 2 and p.stride(1) == 1 and", "p.ndim == 2 and"),
        ],
    ),
    "beft_ext/training/optim.py#rates": (
        (*TUNING, *OPTIM),
        [
            ("max(1, steps - rising + 1)", "max(1, steps - rising)"),
            ("max(1, round(warmup * steps))", "max(1, round(warmup))"),
            ("min((step + 1) / rising", "min(step / rising"),
        ],
    ),
    "beft_ext/training/preparation.py": (
        PREPARATION,
        [
            ("            parameter.grad = None", "            pass"),
            ("max(4, p.element_size())", "p.element_size()"),
            ("list(dict.fromkeys(p.bias.module for p in chosen if not p.has_bias))",
             "[p.bias.module for p in chosen if not p.has_bias]"),
            ("(prepared.required.get(name, as_before))", "(True)"),
            ("and p.bias.layer in inside", ""),
            ("        for bias in biases:\n            bias.view(inside)",
             "        for bias in biases[:1]:\n            bias.view(inside)"),
            ("model.get_submodule(name.removesuffix(\".bias\")).bias = None", "pass"),
            ("return grad.where(self.inside, 0)", "return grad * self.inside"),
            ("for name in (*prepared.head, *(b.parameter for b in prepared.biases))",
             "for name in (b.parameter for b in prepared.biases)"),
            ("    state.clear(model)\n", ""),
            ("if sum(b.width for b in own) < parameter.numel()", "if len(own) > 1"),
        ],
    ),
    "beft_ext/training/tuning.py": (
        TUNING,
        [
            ("p.copy_(run.state.best[name])", "pass"),
            ("        state.loss_sum = 0.0\n", ""),
            ("            weight_decay=recipe.weight_decay,\n", ""),
            ("self.recipe.warmup, self", "0.0, self"),
            ("for _ in range(done + 1):", "for _ in range(done):"),
            ('        torch.set_rng_state(own["random/cpu"])\n', ""),
            ("        self.model.train()\n", ""),
            ("            max_grad_norm=recipe.max_grad_norm,\n", ""),
            ("            torch.manual_seed(ranks.seed(recipe.seed))", "            pass"),
        ],
    ),
    "beft_ext/training/evaluation.py": (
        TUNING,
        [
            ("self.sign * new[key] > self.sign", "self.sign * new[key] >= self.sign"),
            ("for h in history)", "for h in history[-1:])"),
            ("batches, loss), -1)", "batches, loss), 1)"),
            ("divisor = float(rows_of(batch))", "divisor = 1.0"),
        ],
    ),
    "beft_ext/training/data.py": (
        TUNING,
        [
            ("        set_epoch(self.loader, number)", "        pass"),
            ("_seeded(self.seed * 1_000_003 + number)", "_seeded(self.seed)"),
            ("            _set_states(outside)", "            pass"),
            ("            self._stream = _states()\n", ""),
            ("digest_of(batch, self.digest)", "digest_of(batch)"),
        ],
    ),
    "beft_ext/training/steps.py": (
        ("training/test_steps.py",),
        [
            ("return loss.clone(), norm.clone()", "return loss, norm"),
            ('"labels": -100}', '"labels": 0}'),
            ("            tensor.copy_(batch[name])", "            pass"),
            ("        self.rate.fill_(rate)\n", ""),
            ("        step.optimizer.zero_grad()  #", "        #"),
            ("-length % LENGTH_MULTIPLE", "LENGTH_MULTIPLE - length % LENGTH_MULTIPLE"),
            ("len(self.graphs) == MOST_GRAPHS", "False"),
        ],
    ),
    "beft_ext/adapters/applying.py": (
        ADAPTERS,
        [
            ("into.copy_(into.double() + difference.to(into.device, torch.float64))",
             "into.copy_(into + difference.to(into))"),
            ("            _check_finite(key, into)\n        for key", "        for key"),
            ("if more := [m for m, t in left.items() if bool(t.any())]", "if more := []"),
            ("if not same and not torch.equal", "if False and not torch.equal"),
            ("        _deactivate(model, adapters)\n        raise", "        raise"),
            ("        handle.remove()\n", "        pass\n"),
        ],
    ),
    "beft_ext/adapters/reading.py": (
        ADAPTERS,
        [
            ("if shape != expected", "if shape[-1:] != expected[-1:]"),
            ("return min(outputs or", "return max(outputs or"),
            ("    outputs = [given for given, _ in layers if given not in inputs]",
             "    outputs = []"),
            ("    if missing := [n for n in needed if n not in seen]", "    if missing := []"),
            ("    for name, tensor in tensors.items():\n", "    for name, tensor in ():\n"),
            ("    _check_model(model, config)\n", ""),
            ("if target.parent not in (home, blobs)", "if False"),
            ("        if dtype not in ((", "        if False and dtype not in (("),
            ("header > min(size - 8, LARGEST_HEADER)", "header > size - 8"),
            ("names.isdisjoint(endings)", "any(m.endswith(n) for n in names)"),
            ("any(m.endswith(s) for s in saved if s)", "m in saved"),
            ("    if not any(n.endswith(BIAS_ENDING) for n in seen):", "    if False:"),
        ],
    ),
    "beft_ext/adapters/saving.py": (
        ADAPTERS,
        [
            ("        upload.check()\n", ""),
            ("into = whole.setdefault(bias.parameter, torch.zeros_like"
             "(parameter, dtype=torch.float64))",
             "into = whole[bias.parameter] = torch.zeros_like(parameter, dtype=torch.float64)"),
            ("dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32",
             "dtype = torch.float32"),
            ('        facts["not_in_peft"] = reason', "        pass"),
        ],
    ),
    "beft_ext/adapters/merging.py": (
        ADAPTERS,
        [
            ("            guard(model, merged.adapters)", "            pass"),
            ("        release(adapters)\n", "        pass\n"),
            ("        mark(model, merged.prepared)", "        pass"),
            ("    undo_plain(model, merged.plain)\n", ""),
            ("        state.put(model, merged.adapters)", "        pass"),
            ("    state.take(model, Adapters)\n", ""),
        ],
    ),
    "beft_ext/selection/selecting.py": (
        SELECTION,
        [
            ("run.batch_sq.get(bias, 0.0) / run.done", "run.batch_sq.get(bias, 0.0) / run.steps"),
            ("            torch.manual_seed(ranks.seed(seed))\n", ""),
            ("        torch.random.fork_rng(devices=cuda_devices(model)),\n", ""),
            ("                weight_decay=weight_decay,\n", ""),
            ("warmup=warmup,\n", ""),
            ("steps = epochs * length", "steps = length"),
            ("if t not in dead and not", "if not"),
            ("scores.fisher(squares, examples)", "scores.fisher(squares, run.done)"),
            ("elif values[\"beft\"] > 1", "elif values[\"beft\"] > 2"),
            ("key=lambda t: -values[t]", "key=lambda t: values[t]"),
        ],
    ),
    "beft_ext/selection/contenders.py": (
        AUDITION,
        [
            ("state.kept(model), ModelSnapshot(model)", "ModelSnapshot(model)"),
            ("                restore(model)\n", "                pass\n"),
            ("step / 10", "step"),
        ],
    ),
    "beft_ext/selection/candidates.py": (
        SELECTION,
        [
            ("            model.get_submodule(path).bias = None", "            pass"),
            ("    model.eval()\n", ""),
            ("[b for b in lack if b in names]", "lack"),
        ],
    ),
    "beft_ext/selection/run.py": (
        SELECTION,
        [
            ("(*trained, *model.buffers())", "trained"),
            ("required, parameter.grad = self.required", "required, _ = self.required"),
            (".grad_norm * clipped", ".grad_norm"),
            ("itertools.chain(self.begun, self.rest)", "self.rest"),
            ('state[leaf].get("master", leaf)', "leaf"),
            ("            module.training = mode", "            pass"),
            ("        self.examples += size\n", "        self.examples += 1\n"),
            ("grad_norm**2 / bias.width", "grad_norm**2"),
            ("        self.schedule.step()\n", ""),
            ("        self.model.train()\n", ""),
            ("self.tap.step(size, example_offsets=offsets)", "self.tap.step(size)"),
        ],
    ),
    "beft_ext/selection/dead.py": (
        SELECTION,
        [
            ("max(share, self.sizes.get(term, 0.0))", "share"),
            ("share = size / most if most > 0", "share = size if most > 0"),
            ("for dtype in (torch.float64, torch.float32)", "for dtype in (torch.float32,)"),
            ("copy.deepcopy(module).eval()", "copy.deepcopy(module)"),
        ],
    ),
    "beft_ext/selection/choice.py": (
        ("selection/test_choice.py",),
        [
            ('(gains, PRIORS.get(family, PRIORS["other"]), ', '(gains, PRIORS["encoder"], '),
            (".cdf(MARGIN)", ".cdf(0.0)"),
            ("max(0.0, 1 - sum(doubts))", "1 - sum(doubts)"),
            (" - fmean(gains.values.values())", ""),
            ("error / 2**0.5", "error"),
            ('entry.partition("@")[0]', "entry"),
            ("mean * known", "mean"),
            ("    elif first != gains.best:", "    elif False:"),
        ],
    ),
    "beft_ext/models/find.py": (
        MODELS,
        [
            ("first.setdefault((bias.parameter, bias.start), bias)",
             "first.setdefault((bias.module, bias.start), bias)"),
            ("any(step in EXPERTS for step in steps) or ", ""),
            ("return max((e for e in FUSED", "return min((e for e in FUSED"),
            ('return path == ending or path.endswith("." + ending)',
             "return path.endswith(ending)"),
            ("if crossing and term", "if term"),
            ("if any(step in NO_ATTENTION for step in steps):\n            continue",
             "if False:\n            continue"),
        ],
    ),
    "beft_ext/models/find.py#gates": (
        ("adapters/test_adapters.py",),
        [
            ('("mlp_gate", 1, 0, width // 2), ("mlp_up", 1, width // 2, width)',
             '("mlp_up", 1, 0, width // 2), ("mlp_gate", 1, width // 2, width)'),
        ],
    ),
    "beft_ext/models/terms.py": (
        ("models/test_terms.py",),
        [
            ("self.first <= bias.layer <= self.last", "self.first <= bias.layer < self.last"),
            ("min(self.last or 0, other.last or 0)", "max(self.last or 0, other.last or 0)"),
            ("    if first > last:", "    if first >= last:"),
            ("entry.last >= layers", "entry.last > layers"),
            ("if all(taken.values()):", "if any(taken.values()):"),
            ("dict.fromkeys(map(_entry", "list(map(_entry"),
        ],
    ),
    "beft_ext/models/added.py": (
        (*MODELS, "adapters/test_merging.py"),
        [
            ("        setattr(model.config, flag, value)\n    for path, parameter",
             "        pass\n    for path, parameter"),
            ("dtype = next(dtypes, torch.get_default_dtype())",
             "dtype = torch.get_default_dtype()"),
            ("output.bias.double() + constant", "output.bias.double() - constant"),
            ("    source.bias = None\n", ""),
            ("any(_holds(model, n, modules) for n in classes)", "True"),
            ("in range(len(known) + 1)", "in reversed(range(len(known) + 1))"),
            (".requires_grad_(module.weight.requires_grad)", ""),
            ("output.bias.detach().clone()", "output.bias.detach()"),
        ],
    ),
    "beft_ext/models/head.py": (
        MODELS,
        [
            ("for m in (base, embeddings)", "for m in (base,)"),
            ("        if is_quantised(parameter):", "        if False:"),
        ],
    ),
    "beft_ext/models/state.py": (
        MODELS,
        [
            ("_records(model) | {type(record): record}", "{type(record): record}"),
            ("        inside(model).__dict__.pop(_NAME, None)",
             "        setattr(inside(model), _NAME, records)"),
        ],
    ),
    "beft_ext/models/wrappers.py": (
        MODELS,
        [
            ("isinstance(layer, nn.DataParallel) for layer in layers",
             "isinstance(layer, nn.DataParallel) for layer in layers[:1]"),
            (".split(\".\")[: package.count(\".\") + 1] == package.split(\".\")",
             ".startswith(package)"),
            ('        if "_orig_mod" in model._modules:', "        if False:"),
            ("if parameter.is_meta and not has_place(model, name):", "if False:"),
            ('not adapted and _from(layers[-1], "peft")', "False"),
        ],
    ),
    "beft_ext/models/registry.py": (
        MODELS,
        [
            ("q = heads // shared * width", "q = heads * width"),
            ('("query", 0, width), ("value", width, 2 * width), ("key", 2 * width, 3 * width)',
             '("query", 0, width), ("key", width, 2 * width), ("value", 2 * width, 3 * width)'),
            ("    q, k = heads * width, shared * width", "    q, k = heads * width, heads * width"),
            ('"multi_query", True) is False', '"multi_query", True)'),
            ("        return heads, 1\n", "        return heads, heads\n"),
        ],
    ),
    "beft_ext/ops/dispatch.py": (
        ("ops/test_dispatch.py", "ops/test_bias_grad_stats.py"),
        [
            ("        if _from_environment:\n", "        if False:\n"),
            ("        require(name)\n    _forced", "    _forced"),
            ('if DEVICES[_forced] not in ("", device.type)', "if False"),
            ("    if key not in _answers:\n", "    if True:\n"),
            ("if _forced in _PROBES and", "if False and"),
        ],
    ),
    "beft_ext/ops/checks.py": (
        ("ops", "training/test_optim.py"),
        [
            ("        and tensor.is_contiguous()\n", ""),
            ("        and not tensor.is_neg()\n", ""),
            ("        tensor.dtype is dtype\n        and tensor", "        tensor"),
            ("        and tensor.device == device\n", ""),
            ("begin < other_end and other_begin < end", "True"),
        ],
    ),
    "beft_ext/ops/grad_output.py": (
        ROWS,
        [
            ("inside = offsets[0] >= 0 and", "inside ="),
            ("not inside or bool((offsets.diff() < 0).any())", "not inside"),
            ("or set(map(type, (grad_output, *written))) != {Tensor}", "or False"),
            ("        dy = dy.resolve_neg()\n", ""),
            ("            checks.require_memory(dy, *written)\n", ""),
        ],
    ),
    "beft_ext/ops/bias_example_grads.py": (
        ("ops/test_bias_example_grads.py",),
        [
            ("    if checks.overlap(out, dy):", "    if False:"),
            ("        or not _in_rows(out)\n", ""),
            ("row >= width)", "row >= 1)"),
            ("        or out.is_neg()\n", ""),
            ("    torch.autograd.graph.increment_version(out)\n", ""),
        ],
    ),
    "beft_ext/ops/bias_grad_stats.py": (
        ("ops/test_bias_grad_stats.py",),
        [
            ("    if checks.overlap(grad_sum, grad_sum_sq):", "    if False:"),
            ("    torch.autograd.graph.increment_version((grad_sum, grad_sum_sq))\n", ""),
        ],
    ),
    "beft_ext/ops/reference.py": (
        (*ROWS, *OPTIM),
        [
            ("example_offsets) * scale)", "example_offsets))"),
            ("grad_sum.add_(total, alpha=scale)", "grad_sum.add_(total)"),
            ("min(1.0, max_norm / (norm + 1e-6))", "max_norm / (norm + 1e-6)"),
            ("theta - alpha * (m_hat", "theta - (m_hat"),
            ("scores[sorted({block.segment for block in blocks})]", "scores[:]"),
        ],
    ),
    "beft_ext/ops/triton_bias_grad_stats.py": (
        TRITON,
        [
            ("tl.reshape(error, (BLOCK_H,))", "tl.reshape(error * 0.0, (BLOCK_H,))"),
            ("lost + error_b, HALF", "lost, HALF"),
            ("tl.where(error == error, total + error, total)", "total + error"),
            ("tl.minimum(tl.maximum(tl.load(example_offsets + example + 1), 0), tokens)",
             "tl.load(example_offsets + example + 1)"),
            ("before + scale * result", "before + result"),
            ("out + (examples * stride)", "out + (examples * width)"),
        ],
    ),
    "beft_ext/ops/triton_bias_adamw_step.py": (
        TRITON,
        [
            ("t.lr.double()[group_of]", "t.lr.double()[0]"),
            ("tl.cast(elements, tl.int64)", "elements"),
            ("masked_fill_(infinite[0] != 0, torch.inf)", "view(())"),
            ("    if _capturing(device):\n", "    if False:\n"),
            (" * (infinite == 0)", ""),
            ("    raw *= tl.load(unscale)\n", ""),
            ("mask=(rows < end)[:, None], other=0.0", "mask=(rows < end + 1)[:, None], other=0.0"),
        ],
    ),
    "beft_ext/tasks/prompts.py": (
        ("tasks/test_prompts.py",),
        [
            ("prompt = prompt[-room:]", "prompt = prompt[:room]"),
            ("Prompt(self.bos + prompt or", "Prompt(prompt or"),
        ],
    ),
    "beft_ext/tasks/heads.py": (
        ("tasks/test_tasks.py",),
        [("example.label >= outputs", "example.label > outputs")],
    ),
    "beft_ext/files.py": (
        ("test_files.py",),
        [
            ('glob(PARTIAL + "*")', 'glob("partial-*")'),
            ("                (folder / last).unlink(missing_ok=True)", "                pass"),
            ("    path.chmod(0o666 & ~umask)  #", "    #"),
            ("while part := file.read(LARGEST_HEADER):", "if part := file.read(9):"),
            ("key in held or ", ""),
            ("(p.name == last, p)", "p"),
        ],
    ),
    "beft_ext/plots.py": (
        ("test_plots.py",),
        [
            ("if name in dead or not math.isfinite(value)", "if not math.isfinite(value)"),
            ("mean = statistics.fmean(values)", "mean = values[0]"),
            ("(min if smaller else max)", "(max if smaller else max)"),
            ("    if low > 0:\n        return LogNorm(low, high)\n", ""),
            ("    except PlotError as error:", "    except Exception as error:"),
            ("for o in fine if o.method == name]", "for o in fine]"),
        ],
    ),
    "beft_ext/commands/demo.py": (
        ("commands/test_demo.py",),
        [
            ("    torch.manual_seed(SEED)\n    model =", "    model ="),
            ("[b for b in biases if b.term == term]", "list(biases)"),
            ("ModelSnapshot(model), torch.random.fork_rng(devices=[])", "ModelSnapshot(model)"),
            ("steps = EPOCHS * len(loader)", "steps = len(loader)"),
        ],
    ),
    "beft_ext/commands/doctor.py": (
        ("test_install.py",),
        [
            ("find_spec(package) is not None", "find_spec(package) is None"),
            ('("pictures", "plots")', '("pictures", "data")'),
            ('if reason else "usable"', 'if not reason else "usable"'),
        ],
    ),
    "setup.py": (
        ("test_build.py",),
        [
            ('os.environ.get("BEFT_CUDA", "1") != "0"', "True"),
            ('                "-ffp-contract=off",\n', ""),
            ('CUDA_TARGETS = ("75", ', 'CUDA_TARGETS = ('),
            ("code=compute_{t}", "code=sm_{t}"),
            ("            optional=True,\n", ""),
            ('        ext.define_macros.append(("BEFT_WITH_CUDA", "1"))\n', ""),
        ],
    ),
    "csrc/bias_grad_stats.h": (
        STATS,
        [
            ("error += (sum - (total - taken)) + (x - taken);", "error += x - taken;"),
            ("    error += other.error;\n", ""),
            ("error == error ? sum + error : sum", "sum + error"),
            ("sum += rounded_product(scale, grad_out);", "sum += grad_out;"),
            ("last < end ? last : end", "last"),
        ],
    ),
    "csrc/bias_adamw_step.h": (
        (*OPTIM, *CUDA),
        [
            ("root_of_v * f.inverse_root + f.eps", "(root_of_v + f.eps) * f.inverse_root"),
            ("1 - group.lr * group.weight_decay", "1 - group.weight_decay"),
            ("change_dot_initial += d * b0;", "change_dot_initial += b * b0;"),
            ("max_grad_norm <= 0 || factor > 1", "max_grad_norm <= 0"),
        ],
    ),
    "csrc/cpu/bias_grad_stats.cpp": (
        ROWS,
        [
            ("chunk != p.chunks.end() && chunk->example == id", "chunk != p.chunks.end()"),
            ("at = id * out.stride + first", "at = id * p.width + first"),
            ("add_eight<T>(data + t * st, st, sh, cols, out)",
             "add_eight<T>(data + t * st, st, 1, cols, out)"),
            ("  if (cols > 2 * pairs) sum_strip<BF16>", "  if (false) sum_strip<BF16>"),
            ("    out[2 * h + 1] = odd[h];", "    out[2 * h + 1] = even[h];"),
            ("v.offsets[i] * v.stride_t : i", "v.offsets[i] * v.width : i"),
        ],
    ),
    "csrc/cpu/bias_adamw_step.cpp": (
        OPTIM,
        [
            ("    if (!view.tensors[first.tensor].grad) continue;\n", ""),
            ("    if (half) master[i] = b;\n", ""),
            ("x = raw * unscale;\n    change_abs += std", "x = raw;\n    change_abs += std"),
            ("!T::follows(p + i, _mm256_loadu_ps(master + i))", "false"),
            ("view.steps[known] == view.steps[t]", "true"),
            ("    view.steps[t] += 1;\n", "    view.steps[t] = view.steps[0] + 1;\n"),
        ],
    ),
    "csrc/cuda/bias_grad_stats.cu": (
        CUDA,
        [
            ("(s.tokens <= 1 || s.stride_t % kVec == 0)", "true"),
            ("        mine[v].merge(Compensated{other.x, other.y});",
             "        mine[v].add(other.x);"),
            ("    sum.merge(Compensated{part.x, part.y});", "    sum.add(part.x);"),
            ("out + example * stride + column", "out + example * width + column"),
            ("(one_example || s.stride_b % kVec == 0)", "true"),
            ("within(example_offsets[example + 1], tokens) : tokens",
             "example_offsets[example + 1] : tokens"),
        ],
    ),
    "csrc/cuda/bias_adamw_step.cu": (
        CUDA,
        [
            ("group.lr = tables.lr[tensor.group]", "group.lr = tables.lr[0]"),
            ("    if (last) *counter = 0;\n", ""),
            ("scores.add(b, initial[i], g * unscale)", "scores.add(b, initial[i], g)"),
            ("tables.steps[block.tensor] + 1, clip", "tables.steps[block.tensor], clip"),
            ("    if (arguments.grads[i]) tables.steps[i] += 1;",
             "    tables.steps[i] += 1;"),
        ],
    ),
}  # fmt: skip

# Sampled faults that change nothing that anyone could see: (file, line before, line after).
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "beft_ext/adapters/applying.py",
        "if len(tied) == 1 or not given:",
        "if len(tied) == 1 and not given:",
    ): "what is not tied agrees with itself, and nothing given is nothing to compare",
    (
        "beft_ext/adapters/reading.py",
        "if size < 8 or header > min(size - 8, LARGEST_HEADER):",
        "if size < 9 or header > min(size - 8, LARGEST_HEADER):",
    ): "eight bytes are no whole file either way",
    (
        "beft_ext/training/preparation.py",
        "if sum(b.width for b in own) < parameter.numel():",
        "if sum(b.width for b in own) != parameter.numel():",
    ): "slices of a parameter never hold more than all of it",
    (
        "beft_ext/training/loss.py",
        "counted = labels.flatten().ne(IGNORED_LABEL).long().cumsum(0)",
        "counted = labels.flatten().ne(IGNORED_LABEL).long().cumsum( -1)",
    ): "a vector has one axis",
    (
        "beft_ext/training/loss.py",
        "first = _thinned(first, 2, LABELS_KEPT, labels[0])",
        "first = _thinned(first, 2, LABELS_KEPT, labels[ -1])",
    ): "any label of the row will do",
    (
        "beft_ext/training/loss.py",
        "places = [p for p in (near, near - 1, near + 1) if 0 < p < len(row)]",
        "places = [p for p in (near, near - 1, near + 1) if 0 < p is not len(row)]",
    ): "none of them is beyond the length",
    (
        "beft_ext/training/loss.py",
        "k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) == rows else v",
        "k: v[index] if isinstance(v, Tensor) and v.ndim and len(v) is rows else v",
    ): "small integers are one object each",
    (
        "beft_ext/training/loss.py",
        "return first, torch.full_like(second, int(first == 0)) if first == second else second",
        "return first, torch.full_like(second, int(first <= 0)) if first == second else second",
    ): "a label that counts is not below zero",
    (
        "beft_ext/training/loss.py",
        "if labels is None or labels.ndim < 2 or labels.is_floating_point() or "
        "labels.shape[-1] < 2:",
        "if labels is None or labels.ndim < 1 or labels.is_floating_point() or "
        "labels.shape[-1] < 2:",
    ): "of a row alone there is no next label, so it never fits",
    (
        "beft_ext/listener.py",
        "if use == STALE or use in self.reduced or (number or 0) not in (0, -1, step.number):",
        "if use is STALE or use in self.reduced or (number or 0) not in (0, -1, step.number):",
    ): "small integers are one object each",
    (
        "beft_ext/training/flat.py",
        "if p.ndim == 2 and p.stride(1) == 1 and p.stride(0) >= p.shape[1]:",
        "if p.ndim == 2 and p.stride(1) == 1 and p.stride(0) >= p.shape[ 0]:",
    ): "says only whether a step goes through a copy, to the same numbers",
}


def planted() -> Iterator[Fault]:
    for place, (tests, pairs) in PLACES.items():
        for old, new in pairs:
            yield Fault(place.partition("#")[0], old, new, tests)


FAULTS = list(planted())
