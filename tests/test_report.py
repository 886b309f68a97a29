"""The HTML page: what is escaped and embedded, that nothing is fetched from elsewhere, and what a browser shows."""

import base64
import html
import json
import re
import shutil
import subprocess

import imageio.v2 as imageio
import numpy as np
import pytest

from utils.errors import UserError
from utils.report import Report, data_uri, format_cell

BROWSER = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')
# Writes what the browser made of the page into its title. A film's data is not loaded unless it is asked for.
PROBE = """<script>
addEventListener('load', async () => {
    const links = [...document.querySelectorAll('nav a')]
    const films = [...document.querySelectorAll('video')]
    const decoded = film => new Promise(resolve => { film.onloadeddata = film.onerror = resolve; film.load() })
    await Promise.all(films.map(decoded))
    document.title = JSON.stringify({
        pictures: [...document.images].map(image => [image.naturalWidth, image.naturalHeight]),
        films: films.map(film => [film.videoWidth, film.videoHeight, film.duration]),
        links: links.map(link => document.querySelector(link.getAttribute('href')).innerText),
        fits: document.documentElement.scrollWidth <= document.documentElement.clientWidth,
        fetched: performance.getEntriesByType('resource').filter(entry => !entry.name.startsWith('data:')).length,
    })
})
</script></body>"""


def test_a_page_embeds_its_files_and_escapes_its_text(tmp_path):
    picture, film = tmp_path / 'a.png', tmp_path / 'b.mp4'
    picture.write_bytes(b'\x89PNG picture')
    film.write_bytes(b'film')
    report = Report('<run> & "name"')
    report.text('introduction <script>')
    report.section('First & foremost')
    report.table(('name', 'value'), [('<b>', 0.25), ('none', None)])
    report.figure(picture, 'caption "quoted"')
    report.section('Second')
    report.video(film, 'a film')
    report.write(tmp_path / 'report.html')
    page = (tmp_path / 'report.html').read_text()
    assert '<script' not in page and '<b>' not in page and '<h1>&lt;run&gt; &amp; &quot;name&quot;</h1>' in page
    assert '<td>0.25</td>' in page and '<td>–</td>' in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [source for source in sources if not source.startswith('data:')] == ['#s0', '#s1']
    embedded = [base64.b64decode(source.split(',')[1]) for source in sources if source.startswith('data:')]
    assert embedded == [b'\x89PNG picture', b'film']
    assert page.index('introduction') < page.index('<nav>') < page.index('id="s0"') < page.index('id="s1"')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'b.mp4', 'report.html']


@pytest.mark.skipif(BROWSER is None, reason='no Chromium or Chrome is installed')
def test_a_browser_shows_all_of_a_page(tmp_path):
    imageio.imwrite(tmp_path / 'a.png', np.zeros((30, 2000, 3), np.uint8))
    imageio.mimwrite(tmp_path / 'b.mp4', np.zeros((20, 32, 48, 3), np.uint8), fps=10, macro_block_size=1)
    report = Report('a_name_without_a_space,' * 20)
    report.section('Pictures')
    report.figure(tmp_path / 'a.png', 'wider than the page')
    report.section('Films & <settings>')
    report.video(tmp_path / 'b.mp4', 'two seconds')
    report.table(('setting', 'value'), [('path', '/a_directory' * 30)])
    report.write(tmp_path / 'report.html')
    page = (tmp_path / 'report.html').read_text()
    (tmp_path / 'probed.html').write_text(page.replace('</body>', PROBE))
    options = '--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync'
    profile, time = f'--user-data-dir={tmp_path / "profile"}', '--virtual-time-budget=20000'
    command = [BROWSER, *options.split(), profile, time, '--dump-dom', f'file://{tmp_path / "probed.html"}']
    document = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert json.loads(html.unescape(re.search('<title>(.*?)</title>', document)[1])) == {
        'pictures': [[2000, 30]],
        'films': [[48, 32, 2]],
        'links': ['Pictures', 'Films & <settings>'],
        'fits': True,
        'fetched': 0,
    }


def test_a_missing_picture_is_told(tmp_path):
    with pytest.raises(UserError, match=r'cannot read .*gone\.png'):
        data_uri(tmp_path / 'gone.png')


@pytest.mark.parametrize(
    ('value', 'shown'),
    [(0.0, '0'), (1234.56, '1235'), (1e-7, '1.00e-07'), (float('nan'), '–'), (None, '–'), (3, '3'), ('x', 'x')],
)
def test_cells(value, shown):
    assert format_cell(value) == shown
