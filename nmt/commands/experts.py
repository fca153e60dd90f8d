"""nmt experts: report on the experts of a run, explain a translation, or write a run with more or fewer experts."""

import argparse

from nmt.commands import Parser
from nmt.commands.direction import is_given
from nmt.config import Config
from nmt.errors import UserError
from nmt.run import RunDirectory


def parser() -> Parser:
    """Options of `nmt experts`."""
    parser = Parser(
        "experts",
        "Show what the experts of each MoE layer do: a report on the run's test set (report/experts.html and .md), or "
        "an explanation of one sentence. Or write a new run with more or fewer experts.",
        "  nmt experts runs/demo\n"
        "  nmt experts demo --source my.en --reference my.de\n"
        "  nmt experts demo --explain 'The train leaves at 14:35.'\n"
        "  nmt experts many --explain 'The train leaves at 14:35.' --from en --to fr\n"
        "  nmt experts demo --grow 32 -o demo-32\n"
        "  nmt experts demo --grow 32 --redraw 0.5 -o demo-32\n"
        "  nmt experts demo-32 --prune 8 -o demo-24\n"
        "  nmt experts demo-32 --prune idle -o demo-pruned --max-loss 0.3\n"
        "  nmt experts demo-32 --merge 8 -o demo-merged",
    )
    parser.add_argument("--source", metavar="F", help="sentences for the report (default: the run's own test set)")
    parser.add_argument("--reference", metavar="F", help="their translations, line by line")
    parser.add_direction()
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--explain", metavar="SENTENCE", help="the experts of each token, and what each contributes")
    task.add_argument(
        "--grow", type=int, metavar="N", help="a new run with N experts per layer that translates the same"
    )
    task.add_argument(
        "--prune", metavar="N|idle", help="a new run without the N least useful experts per layer, or without idle ones"
    )
    task.add_argument(
        "--merge", type=int, metavar="N", help="a new run with N pairs of similar experts per layer merged"
    )
    parser.add_argument(
        "--redraw",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="with --grow, draw this share of the hidden units of each new copy again, such as 0.5: copies then differ "
        "from the start, but the new run translates differently (default: 0)",
    )
    parser.add_argument("-o", "--output", metavar="NEWRUN", help="folder or name of the new run")
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.5,
        metavar="BLEU",
        help="write no run if --prune or --merge loses more than this (default: 0.5)",
    )
    return parser


def run(options: argparse.Namespace, run: RunDirectory, config: Config) -> None:
    """Do what the options ask for: a report by default."""
    resizing = options.grow is not None or options.prune is not None or options.merge is not None
    if resizing != (options.output is not None):
        raise UserError("-o NEWRUN goes with --grow, --prune or --merge" + (", which need it" if resizing else ""))
    if resizing and (is_given(options) or options.tag):
        raise UserError("--from, --to and --tag are for the report and --explain: leave them out")
    if options.redraw and options.grow is None:
        raise UserError("--redraw goes with --grow")
    if resizing and run.exported:
        raise UserError(f"{run.path} is an exported model, which cannot be trained: give the run it was exported from")
    if not config.model.moe.num_experts and options.grow is None:
        raise UserError(f"{run.path} has no experts: model.moe.num_experts is 0 (add experts with --grow)")
    # Imported when needed: resizing writes optimiser state and so needs the libraries of training.
    if resizing:
        from nmt.commands.resize import resize

        resize(options, run, config)
    elif options.explain is not None:
        from nmt.commands.explain import explain

        explain(options, run, config)
    else:
        from nmt.commands.report import report

        report(options, run, config)
