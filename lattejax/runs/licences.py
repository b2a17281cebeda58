"""The licences of a model card, by the hub's identifiers."""

import difflib

from lattejax.errors import UserError

PAGE = "https://huggingface.co/docs/hub/repositories-licenses"
UNKNOWN, OTHER = "unknown", "other"
# Those of that page, in August 2026.
NAMED = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0
cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma
"""
IDENTIFIERS = (*NAMED.split(), UNKNOWN, OTHER)


def check_licence(identifier: str) -> None:
    """Raises `UserError`, with the nearest identifiers, for one that the hub does not know."""
    if identifier not in IDENTIFIERS:
        near = difflib.get_close_matches(identifier.lower(), IDENTIFIERS, n=3, cutoff=0.3)
        nearest = f"the nearest are {', '.join(near)}; " if near else ""
        raise UserError(f"--license={identifier!r:.50} is not one of the hub's identifiers; {nearest}see {PAGE}")
