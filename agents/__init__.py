"""The agents by name: which there are, and the module behind a name or a path.

One file here is one agent; what several agents share lies beside them. Nothing is imported until it is asked for.
"""

import difflib
import importlib
from pathlib import Path
from types import ModuleType

from utils.errors import UserError

FOLDER = Path(__file__).resolve().parent
# Names under which the same agents go elsewhere.
ALIASES = {'fb_repr': 'fb_iql', 'hilp': 'hilp_iql'}


def available() -> list[str]:
    """Names of the agents, sorted: the files of this folder that define `get_config`."""
    files = (path for path in FOLDER.glob('*.py') if path.stem != '__init__')
    return sorted(path.stem for path in files if 'def get_config(' in path.read_text(encoding='utf-8'))


def resolve(agent: str) -> str:
    """The name of the agent that `agent` stands for: a name ('infom'), an alias ('hilp') or a path ('agents/infom.py').

    Raises:
        UserError: there is none; the message gives the nearest names.
    """
    path = Path(agent)
    name = ALIASES.get(path.stem, path.stem)
    known = available()
    here = path.parent in (Path(), Path(FOLDER.name)) or path.parent.resolve() == FOLDER
    if here and path.suffix in ('', '.py') and name in known:
        return name
    near = difflib.get_close_matches(name, known, n=3)
    hint = f'did you mean {" or ".join(near)}?' if near else f'expected one of {", ".join(known)}'
    where = '' if here else ' (agents are files of the folder agents/ and nowhere else)'
    raise UserError(f'there is no agent {agent!r}{where}: {hint}')


def load(agent: str) -> ModuleType:
    """The agent's module, imported on first use; see `resolve` for what `agent` may be and for the error."""
    return importlib.import_module(f'{__name__}.{resolve(agent)}')
