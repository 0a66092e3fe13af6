"""One printer of tables: text, markdown and HTML; and results that show themselves by it."""

import dgm_pyro as dgm
from dgm_pyro.experiments.commands import Shown
from dgm_pyro.results import Result, Table, as_csv, with_error


def test_a_table_as_text_markdown_and_html():
    table = Table(["name", "nats"], [["a<b", "-1.5"], ["c|d", "10.25 +- 0.1"]])
    assert str(table) == "name          nats\na<b           -1.5\nc|d   10.25 +- 0.1"
    assert table.markdown() == "| name | nats |\n| --- | --- |\n| a<b | -1.5 |\n| c\\|d | 10.25 +- 0.1 |"
    assert '<td style="text-align: left">a&lt;b</td><td style="text-align: right">-1.5</td>' in table.html()
    assert str(Table(["a", "bb"], [])) == "a  bb"
    assert str(Table(["run", "kl"], [["a", "-"], ["b", "1.0"]])) == "run   kl\na      -\nb    1.0"


def test_numbers_and_records():
    assert [with_error(*each, 2) for each in ((1.0, 0.5), (1.0, float("nan")), (float("nan"), 0.5))] == [
        "1.00 +- 0.50", "1.00", "-",
    ]  # fmt: skip
    assert as_csv([{"a": 1}, {"a": 2, "b": "x,y"}]) == 'a,b\n1,\n2,"x,y"\n'


def test_a_result_shows_the_same_in_text_and_in_a_notebook():
    diagnosis = dgm.doctor(dgm.build("vae", dgm.data.load("digits", num_data=32)), dgm.data.load("digits", num_data=32))
    assert isinstance(diagnosis, Result)
    for line in str(diagnosis).splitlines():
        assert line.split("(")[0].split("<")[0].strip() in diagnosis._repr_html_()


def test_what_a_command_shows_is_the_result_and_what_it_is_about():
    diagnosis = dgm.doctor(dgm.Normal(2), dgm.data.load("moons", num_data=8))
    shown = Shown(diagnosis, "a Normal: ", "a.png", {"run": "a"})
    assert str(shown) == f"a Normal: {diagnosis}\na.png"
    assert shown.as_dict() == {"run": "a"} | diagnosis.as_dict()
    assert "a.png" in shown._repr_html_()
    assert str(Shown(Numbers())) == str(Numbers())
    assert str(Shown(Numbers(), "two numbers")) == f"two numbers\n{Numbers()}"


class Numbers(Result):
    def parts(self):
        return [Table(["a", "b"], [["1", "2"]])]

    def as_dict(self):
        return {"a": 1, "b": 2}
