"""The HTML page: what is escaped, what is embedded, and that nothing in it is fetched from elsewhere."""

import base64
import re

import pytest

from utils.errors import UserError
from utils.report import Report, data_uri, format_cell


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


def test_a_missing_picture_is_told(tmp_path):
    with pytest.raises(UserError, match=r'cannot read .*gone\.png'):
        data_uri(tmp_path / 'gone.png')


@pytest.mark.parametrize(
    ('value', 'shown'),
    [(0.0, '0'), (1234.56, '1235'), (1e-7, '1.00e-07'), (float('nan'), '–'), (None, '–'), (3, '3'), ('x', 'x')],
)
def test_cells(value, shown):
    assert format_cell(value) == shown
