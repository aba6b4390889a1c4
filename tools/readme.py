"Write README.md from nbs/index.ipynb. `--check` only compares and exits 1 where they differ."
import argparse, os, posixpath, re, sys
from pathlib import Path

import nbformat
import yaml
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExtractOutputPreprocessor, TagRemovePreprocessor
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT/'nbs'/'index.ipynb'
PICTURES = 'images'  # outside nbs, so that the site does not copy them
DIRECTIVE = re.compile(r'^[ \t]*#\|[ \t]*([\w-]+):?[ \t]*(.*)\n?', re.M)
# Code comes first, so that `names[0](x)` in it is no link; a link's text may itself be code.
CODE_OR_LINK = re.compile(r'(```.*?```|`[^`\n]*`)|(!?\[(?:`[^`]*`|[^\]`])*\]\()([^)\s]+)\)', re.S)
FENCED_DIV = re.compile(r'^:::.*\n?', re.M)


class PicturesByCell(ExtractOutputPreprocessor):
    "Name a picture after its cell's id: a new cell above it then renames nothing."
    def preprocess_cell(self, cell, resources, cell_index): return super().preprocess_cell(cell, resources, cell.id)


def processed_index()->nbformat.NotebookNode:
    "The index as nbdev prepares it for the site."
    from execnb.nbio import nb2dict, read_nb
    from nbdev.processors import FilterDefaults
    os.environ['IN_TEST'] = '1'  # as nbdev sets it, so that nothing is exported on the way
    nb = read_nb(INDEX)
    FilterDefaults()(nb)
    del os.environ['IN_TEST']
    return nbformat.from_dict(join_lines(nb2dict(nb)))

def join_lines(node):
    "Multi-line strings as one: files hold lists of lines, nbconvert expects strings."
    if isinstance(node, dict): return {k: '' if k == 'source' and not v else join_lines(v) for k, v in node.items()}
    if not isinstance(node, list): return node
    return ''.join(node) if node and isinstance(node[0], str) else [join_lines(o) for o in node]

def apply_directives(cell)->None:
    "Do to a cell what Quarto would: hide its code or output, and forget the directive lines."
    said = dict(DIRECTIVE.findall(cell.source))
    hidden = {name for name in ('echo', 'output', 'include') if said.get(name, '').strip() == 'false'}
    cell.metadata = nbformat.from_dict({'tags': sorted(hidden), 'caption': said.get('fig-cap', '').strip(' "\'')})
    cell.source = DIRECTIVE.sub('', cell.source).strip()
    cell.outputs = [o for o in cell.outputs if o.output_type != 'error']

def take_front_matter(nb)->str:
    "The title and subtitle, which nbdev has moved into a raw cell, as markdown again."
    front = {}
    for cell in [c for c in nb.cells if c.cell_type == 'raw']:
        front.update(yaml.safe_load(cell.source.strip().strip('-')) or {})
        nb.cells.remove(cell)
    subtitle = f"\n> {front['description']}\n" if 'description' in front else ''
    return f"# {front['title']}\n{subtitle}\n"

def ready(nb)->nbformat.NotebookNode:
    "Give every cell what nbconvert needs and what makes two runs equal."
    pages = page_files()
    for i, cell in enumerate(nb.cells):
        cell.setdefault('id', f'cell-{i}')
        if cell.cell_type == 'code': apply_directives(cell)
        else: cell.source = repo_links(FENCED_DIV.sub('', cell.source), pages)
    nb.cells = [c for c in nb.cells if c.source.strip() or c.get('outputs')]
    nb.metadata = nbformat.from_dict({'language_info': {'name': 'python'}})
    return nb

def exporter()->MarkdownExporter:
    "nbconvert's markdown, with our names for pictures and Quarto's wish to hide."
    c = Config()
    c.TagRemovePreprocessor.update(enabled=True, remove_input_tags={'echo'}, remove_all_outputs_tags={'output'}, remove_cell_tags={'include'})
    c.MarkdownExporter.default_preprocessors = [TagRemovePreprocessor, PicturesByCell]
    return MarkdownExporter(config=c)

def page_files()->dict[str, str]:
    "For every page of the site, the notebook that it is made from."
    from nbdev.doclinks import _nbpath2html
    books = [p.relative_to(INDEX.parent) for p in sorted(INDEX.parent.rglob('*.ipynb'))]
    return {_nbpath2html(p).as_posix(): p.as_posix() for p in books}

def repo_link(target:str, pages:dict[str, str])->str:
    "A link that works from README.md, given one that works from nbs/index.ipynb or from its page."
    if re.match(r'^(\w+:|#)', target): return target
    path, _, anchor = target.partition('#')
    if path in pages: path, anchor = pages[path], ''  # a notebook shown by a repository host has no such anchor
    return posixpath.normpath(posixpath.join('nbs', path)) + (f'#{anchor}' if anchor else '')

def repo_links(text:str, pages:dict[str, str])->str:
    "Markdown with its links turned into links of the repository."
    return CODE_OR_LINK.sub(lambda m: m[1] or f'{m[2]}{repo_link(m[3], pages)})', text)

def captioned(text:str, nb)->str:
    "Pictures with their captions."
    captions = {c.id: c.metadata.get('caption') for c in nb.cells if c.cell_type == 'code'}
    def caption(m):
        said = captions.get(m[2])
        return f'![{said}]({m[1]})\n\n*{said}*' if said else m[0]
    return re.sub(rf'!\[\w+\]\(({PICTURES}/index_([\w-]+?)_\d+\.\w+)\)', caption, text)

def render()->tuple[str, dict[str, bytes]]:
    "The text of the README and its pictures, by path."
    nb = processed_index()
    head = take_front_matter(nb)
    resources = {'unique_key': 'index', 'output_files_dir': PICTURES}
    text, resources = exporter().from_notebook_node(ready(nb), resources=resources)
    text = re.sub(r'^[ \t]+$', '', captioned(text, nb), flags=re.M)
    return head + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources['outputs']

def differences(files:dict[str, bytes])->list[str]:
    "Paths that are missing, differ, or should not be there."
    changed = [name for name, data in files.items() if not (ROOT/name).is_file() or (ROOT/name).read_bytes() != data]
    return changed + [name for name in made_pictures() if name not in files]

def made_pictures()->list[str]: return [p.relative_to(ROOT).as_posix() for p in sorted((ROOT/PICTURES).glob('index_*'))]

def write(files:dict[str, bytes])->None:
    for name in made_pictures(): (ROOT/name).unlink()
    for name, data in files.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)

def main()->None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='compare only')
    check = parser.parse_args().check
    os.chdir(ROOT)
    text, pictures = render()
    files = {'README.md': text.encode(), **pictures}
    if not check: return write(files)
    if changed := differences(files): sys.exit('Not what nbs/index.ipynb makes: ' + ', '.join(changed))


if __name__ == '__main__': main()
