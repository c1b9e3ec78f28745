"""Looking at what an adapter's routers do: collect their choices on prompts, summarise them, show them as a page."""

from ldmole_ds.analysis.collect import Prompt, Routing, collect_routing, encode_prompts
from ldmole_ds.analysis.page import render_page
from ldmole_ds.analysis.summary import summarise

__all__ = ["Prompt", "Routing", "collect_routing", "encode_prompts", "render_page", "summarise"]
