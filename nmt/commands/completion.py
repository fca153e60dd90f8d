"""nmt completion bash | zsh | fish: print a script that completes commands, options, settings and runs."""

import argparse
from importlib import import_module

from nmt.commands import ON_RUNS, ON_SETTINGS, ON_SYSTEMS, PLAIN, Parser, show
from nmt.config.choices import find_places, known_groups
from nmt.config.describe import settings

_COMPOSING = ["--config-dir", "--multirun", "--cfg", "--help"]

_BASH = """\
# nmt: completion for bash. Put this line into ~/.bashrc:  source <(nmt completion bash)
_nmt() {{
    # bash splits words at "=": take the word from the line, and do not repeat the part before "=".
    local line="${{COMP_LINE:0:COMP_POINT}}" each path
    local word="${{line##* }}"
    local -a found=()
    if ((COMP_CWORD == 1)); then
        found=({commands} --help --version)
    elif case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
        *) false ;;
    esac then :
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
        case "${{COMP_WORDS[1]}}" in
            {with_runs}) for path in runs/*/config.yaml; do
                path="${{path#runs/}}"; [[ $path == "*"* ]] || found+=("$(printf %q "${{path%/config.yaml}}")")
            done ;;
        esac
        case "${{COMP_WORDS[1]}}" in
            {with_files}) for path in conf/*/*.yaml; do
                [[ -f $path ]] || continue
                path="${{path#conf/}}"; path="${{path%.yaml}}"
                [[ $path == *[^[:alnum:]_./-]* ]] || found+=("${{path/\\//=}}")
            done ;;
        esac
    fi
    COMPREPLY=()
    for each in "${{found[@]}}"; do
        [[ $each == "$word"* ]] && COMPREPLY+=("${{each#"${{word%"${{word##*=}}"}}"}}")
    done
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
    return 0
}}
complete -o default -F _nmt nmt
"""

_ZSH = """\
#compdef nmt
# nmt: completion for zsh. Put this line into ~/.zshrc, below compinit:  source <(nmt completion zsh)
_nmt() {{
    local -aU found files
    if ((CURRENT == 2)); then
        compadd -- {commands} --help --version
        return
    fi
    case "$words[2] $words[CURRENT-1]" in
{values}
    esac
    (($#found)) && {{ compadd -- $found; return; }}
    case $words[2] in
{cases}
    esac
    case $words[2] in
        {with_runs}) found+=(runs/*/config.yaml(N:h:t)) ;;
    esac
    case $words[2] in
        {with_files})
            files=(conf/*/*.yaml(N-.:r)); files=(${{files#conf/}}); files=(${{files:#*[^[:alnum:]_./-]*}})
            found+=(${{files/\\//=}}) ;;
    esac
    compadd -S '' -- ${{(M)found:#*=}}
    compadd -- ${{found:#*=}}
    _files
}}
compdef _nmt nmt
"""

_FISH = """\
# nmt: completion for fish. Put this line into ~/.config/fish/config.fish:  nmt completion fish | source
complete -c nmt -f -n __fish_use_subcommand -a '{commands} --help --version'
{cases}
{values}
complete -c nmt -n '__fish_seen_subcommand_from {with_runs}' \\
    -a '(for each in runs/*/config.yaml; string replace -r "^runs/(.*)/config.yaml" "\\$1" $each; end)'
complete -c nmt -n '__fish_seen_subcommand_from {with_files}' \\
    -a '(for each in conf/*/*.yaml; test -f $each; and string replace -fr "^conf/([\\w.-]+)/([\\w.-]+).yaml\\$" \\
        "\\$1=\\$2" $each; end)'
"""


def parser() -> Parser:
    """Options of `nmt completion`."""
    parser = Parser(
        "completion",
        "Print a script that completes commands, options, settings and run names. The shell reads it when it starts.",
        "  source <(nmt completion bash)     # in ~/.bashrc\n"
        "  source <(nmt completion zsh)      # in ~/.zshrc, below compinit\n"
        "  nmt completion fish | source      # in ~/.config/fish/config.fish",
        takes_run=False,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="your shell")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the completion for `options.shell`."""
    commands = [*ON_SETTINGS, *ON_RUNS, *ON_SYSTEMS, *PLAIN]
    with_runs, with_files = [*ON_RUNS, *ON_SYSTEMS, "train", "distill", "cost"], list(ON_SETTINGS)
    match options.shell:
        case "fish":
            text, join = _FISH, " ".join
            case = "complete -c nmt -n '__fish_seen_subcommand_from {}' -a '{}'"
            value = "complete -c nmt -n '__fish_seen_subcommand_from {}' -l {} -x -a '{}'"
        case shell:
            text, join = {"bash": _BASH, "zsh": _ZSH}[shell], "|".join
            case = "            {}) found=({}) ;;"
            value = '        "{} --{}") found=({}) ;;'
    cases = "\n".join(case.format(command, " ".join(words(command))) for command in commands)
    values = "\n".join(
        value.format(command, option.removeprefix("--"), " ".join(allowed))
        for command in ("distill", "cost", *ON_RUNS, *ON_SYSTEMS)
        for option, allowed in _parser(command).choices().items()
    )
    names = {"values": values, "with_runs": join(with_runs), "with_files": join(with_files)}
    show(text.format(commands=" ".join(commands), cases=cases, **names).rstrip("\n"))


def words(command: str) -> list[str]:
    """Return the words that may follow a command: options, settings as KEY=, and choices of files as GROUP=NAME."""
    keys = [each.key for each in settings()]
    match command:
        case "completion":
            return ["bash", "zsh", "fish", "--help"]
        case "settings":
            return [*keys, *known_groups(), *_options(command)]
        case "prepare":
            own = ["--processes", "--scores", *_COMPOSING, *_choices("experiment", "corpus")]
            return [*own, *(f"{key}=" for key in keys if key[:6] == "corpus")]
        case "train":
            return ["--processes", *_COMPOSING, *_choices(), *(f"{key}=" for key in keys)]
        case "distill" | "cost":
            return [*_options(command), *_COMPOSING[:-1], *_choices(), *(f"{key}=" for key in keys)]
    taken = [
        f"{key}=" for key in keys if command in (*ON_RUNS, *ON_SYSTEMS) and key.startswith(("decoding.", "evaluation."))
    ]
    return [*_options(command), *taken]


def _options(command: str) -> list[str]:
    return _parser(command).options()


def _parser(command: str) -> Parser:
    parser: Parser = import_module(f"nmt.commands.{command}").parser()
    return parser


def _choices(*groups: str) -> list[str]:
    """Return GROUP=NAME for each file of these groups (none given: all groups) in the program's own conf/."""
    own = find_places()[-1]
    return [f"{group}={name}" for group in groups or known_groups() for name in own.names(group)]
