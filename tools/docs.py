"What nbdev runs on each page after its own processors; settings.ini names it under `procs`."
import re
from pathlib import Path

from nbdev.config import get_config
from nbdev.process import Processor

SITE_LINK = re.compile(r'\]\(/(?!/)')
SOURCE_LINK = re.compile(r'\[source\]\(/[^)]*\)\{[^}]*\}\s*')


class LocalLinks(Processor):
    "Make links from the site's root relative to the page, and drop links to a source host that settings.ini does not name."
    def begin(self):
        page = Path(self.nb.path_).resolve().relative_to(get_config().nbs_path.resolve())
        self.up = '../'*(len(page.parts) - 1)

    def cell(self, cell):
        if cell.cell_type == 'markdown' and cell.source: cell.source = self.localize(cell.source)
        for output in cell.get('outputs', []):
            lines = output.get('data', {}).get('text/markdown')
            if lines: output['data']['text/markdown'] = self.localize(''.join(lines)).splitlines(True)

    def localize(self, text:str): return SITE_LINK.sub(f']({self.up}', SOURCE_LINK.sub('', text))
