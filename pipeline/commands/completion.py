"""What a shell needs to complete the words of u2pl, without a library: the first TAB behind a command asks it once."""

from collections.abc import Sequence

from pipeline.config.cli import FLAGS_FLAG
from pipeline.errors import UserError

SHELLS = ("bash", "zsh")
_SCRIPT = """\
# Completion of u2pl. In ~/.bashrc or ~/.zshrc: source <(u2pl --completion SHELL)
_u2pl() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" known values line
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "COMMANDS --help --version --completion" -- "$word"))
    return
  fi
  eval "known=\\"\\$_u2pl_of_${COMP_WORDS[1]//[^a-z_]/_}\\""
  if [ -z "$known" ]; then
    known="$(u2pl "${COMP_WORDS[1]}" FLAGS 2> /dev/null)"
    eval "_u2pl_of_${COMP_WORDS[1]//[^a-z_]/_}=\\"\\$known\\""
  fi
  while read -r line; do
    case "$word" in
      -*) values="$values ${line%% *}" ;;
      *) [ "${line%% *}" = "$before" ] && values="${line#"$before"}" ;;
    esac
  done <<< "$known"
  COMPREPLY=($(compgen -W "$values" -- "$word"))
}
complete -o default -F _u2pl u2pl
"""
_ZSH = """\
whence compdef > /dev/null || { autoload -Uz compinit && compinit -u; }
autoload -Uz bashcompinit && bashcompinit
"""


def script(shell: str, commands: Sequence[str]) -> str:
    """A script for a shell to read: `source <(u2pl --completion bash)`.

    Args:
        shell: one of `SHELLS`.
        commands: the names of the commands.

    Raises:
        UserError: another shell.
    """
    if shell not in SHELLS:
        raise UserError(f"--completion {shell}: expected {' or '.join(SHELLS)}")
    text = _SCRIPT.replace("COMMANDS", " ".join(commands)).replace(" FLAGS ", f" {FLAGS_FLAG} ")
    return _ZSH * (shell == "zsh") + text.replace("SHELL", shell)
