"A notebook in a real JupyterLab and a real browser, for tests that click."
import os, secrets, shutil, subprocess, sys, time, urllib.error, urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat

from support import free_port

QUIET = ['--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-gpu', '--disable-quic']


def chromium():
    "The browser's path."
    found = next((path for name in ('chromium', 'chromium-browser', 'google-chrome') if (path := shutil.which(name))), None)
    assert found, 'These tests need Chromium (Debian: apt-get install chromium).'
    return found

def write_notebook(path, *cells):
    "A notebook of code cells."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nbformat.write(nb, path)
    return path

@contextmanager
def lab(folder):
    "JupyterLab on this machine's loopback, behind a token. Gives the address of a notebook by its file name."
    port, token, home = free_port(), secrets.token_hex(16), Path(folder)/'.jupyter-home'
    places = {name: str(home/name) for name in ('JUPYTER_CONFIG_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--allow-root', f'--ServerApp.root_dir={folder}', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    settings = Path(places['JUPYTERLAB_SETTINGS_DIR'])/'@jupyterlab'/'apputils-extension'
    settings.mkdir(parents=True)
    (settings/'notification.jupyterlab-settings').write_text('{"fetchNews": "false"}') # the question about it would cover buttons
    with open(home/'lab.log', 'w') as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | places | dict(JUPYTER_TOKEN=token, OMP_NUM_THREADS='1'), cwd=folder)
        try:
            _until_up(f'http://127.0.0.1:{port}/api/status?token={token}', server, home/'lab.log')
            yield lambda name: f'http://127.0.0.1:{port}/doc/tree/{name}?token={token}'
        finally: server.terminate(); server.wait(30)

def _until_up(address, server, log, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try: return urllib.request.urlopen(address, timeout=2).close()
        except (urllib.error.URLError, OSError): time.sleep(.25)
    raise TimeoutError(log.read_text()[-3000:])

@contextmanager
def browser(folder, width=1100, height=3400): # so high that nothing has to be scrolled
    "A page of a headless browser. What it shows when something fails is kept in `folder`."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        program = p.chromium.launch(executable_path=chromium(), args=['--no-sandbox', *QUIET])
        try:
            page = program.new_page(viewport=dict(width=width, height=height))
            page.set_default_timeout(60_000)
            try: yield page
            except BaseException:
                page.screenshot(path=Path(folder)/'failed.png')
                raise
        finally: program.close()

def open_notebook(page, address):
    "Open it alone in the window, and wait for its kernel."
    page.goto(address)
    page.locator('.jp-NotebookPanel').wait_for()
    page.get_by_text('| Idle').first.wait_for() # a run before that would ask for a kernel

def menu(page, title, command):
    "Choose an entry of the menu bar, named by JupyterLab's command."
    page.get_by_role('menuitem', name=title, exact=True).click()
    page.locator(f'[data-command="{command}"]').first.click()

def run_all(page): menu(page, 'Run', 'runmenu:run-all')

def restart_and_run_all(page):
    "A fresh kernel, then every cell again."
    menu(page, 'Run', 'runmenu:restart-and-run-all')
    page.locator('.jp-Dialog .jp-mod-accept').click()
    page.wait_for_timeout(1000)
    page.get_by_text('| Idle').first.wait_for()
