"""A diff to walk through in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.geometry import Size
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option

from pe_fx.diff.changes import Diff
from pe_fx.diff.outline import Item, Outline
from pe_fx.diff.terminal import summary


class Pane(ScrollView, can_focus=False):
    """One column of the outline: its tree, or what stands there before or after. Draws only the lines that are seen."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        f"pane--{role}" for role in ("cursor", "shared", "site", "context", "before", "after", "note", "absent")
    }

    def __init__(self, column: str, title: str) -> None:
        super().__init__(id=column)
        self.column = column
        self.border_title = Text(title)

    @property
    def viewer(self) -> Viewer:
        assert isinstance(self.app, Viewer)
        return self.app

    def render_line(self, y: int) -> Strip:
        line = y + self.scroll_offset.y
        width = self.scrollable_content_region.width
        if line >= len(self.viewer.lines):
            return Strip.blank(width, self.rich_style)
        item = self.viewer.lines[line]
        text = self._tree(item, width) if self.column == "tree" else self._side(item)
        text.truncate(width, overflow="ellipsis", pad=True)
        if line == self.viewer.cursor:
            text.stylize(self.style("cursor"))
        elif item in self.viewer.shared:
            text.stylize(self.style("shared"))
        return Strip(text.render(self.app.console), width).apply_style(self.rich_style)

    def _tree(self, item: Item, width: int) -> Text:
        fold = "  " if not item.children else "▾ " if item.is_open else "▸ "
        shared = "≡ " if item in self.viewer.shared else ""
        role = "site" if item.changes or item.edit or item in self.viewer.holders else "context"
        text = self._text("  " * item.depth + fold + shared + item.name, role)
        note = self.viewer.outline.note(item)
        text.truncate(max(width - len(note) - 1, 8), overflow="ellipsis", pad=True)
        return text.append(f" {note}", self.style("note"))

    def _side(self, item: Item) -> Text:
        mine, other = self.viewer.outline.columns(item)[:: 1 if self.column == "before" else -1]
        if mine is None:
            return self._text("╱" * self.scrollable_content_region.width, "absent")
        if item.edit is None if item.is_operation else mine == other:
            return self._text(f"  {mine}", "context")
        mark = {"before": "- ", "after": "+ "}[self.column] if item.is_operation else "  "
        return self._text(mark + mine, self.column)

    def _text(self, text: str, role: str) -> Text:
        return Text().append(text, self.style(role))

    def style(self, role: str) -> Style:
        return self.get_component_rich_style(f"pane--{role}", partial=True) if role != "line" else Style()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        self.viewer.scroll_together(new_value)

    def on_click(self, event: events.Click) -> None:
        line = event.y - self.gutter.top + self.scroll_offset.y
        if event.y >= self.gutter.top and line < len(self.viewer.lines):
            again = line == self.viewer.cursor
            self.viewer.cursor = line
            if again:
                self.viewer.action_fold()


class Misses(ModalScreen[str | None]):
    """What looks like a site and is none, with reasons; answers with the module that was chosen."""

    AUTO_FOCUS = "OptionList"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,m,q", "dismiss(None)", "Back")]

    def __init__(self, diff: Diff) -> None:
        super().__init__()
        self.diff = diff

    def compose(self) -> ComposeResult:
        texts = [Text.assemble((f"{miss.name or '.'}  {miss.kind}\n", "bold"), miss.reason) for miss in self.diff.misses]
        options = OptionList(*map(Option, texts))
        options.border_title = f"{len(texts)} near misses" if len(texts) != 1 else "1 near miss"
        options.border_subtitle = "enter: go there   esc: back"
        yield options

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self.diff.misses[event.option_index].name)


class Viewer(App[None]):
    """The tree of modules, both graphs beside it, and the details of what the cursor is on."""

    TITLE = "pe-fx diff"
    AUTO_FOCUS = None
    CSS = """
    #summary { height: 1; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; background: $panel; }
    Pane { width: 1fr; border-top: solid $primary; overflow-x: hidden; overflow-y: scroll; scrollbar-size-vertical: 0; }
    Pane#tree { width: 34%; max-width: 60; }
    Pane#after { scrollbar-size-vertical: 1; }
    Pane#before, Pane#after { border-left: vkey $primary-muted; }
    .pane--cursor { background: $primary-muted; text-style: bold; }
    .pane--shared { background: $warning-muted; }
    .pane--site { text-style: bold; }
    .pane--context { text-style: dim; }
    .pane--before { color: $text-error; }
    .pane--after { color: $text-success; }
    .pane--note { color: $text-accent; }
    .pane--absent { text-style: dim; }
    #details { height: 11; border-top: solid $primary; padding: 0 1; }
    .-short #details { height: 5; }
    #search { border: none; height: 1; padding: 0 1; display: none; }
    Misses { align: center middle; }
    Misses OptionList { width: 90%; max-width: 110; height: auto; max-height: 80%; border: round $primary; }
    """
    VERTICAL_BREAKPOINTS = [(0, "-short"), (24, "-tall")]  # noqa: RUF012 (Textual declares no ClassVar)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "change(1)", "Change"),
        Binding("C", "change(-1)", "Back to the change before", show=False),
        Binding("slash", "search", "Search", key_display="/"),
        Binding("n", "match(1)", "Next match", show=False),
        Binding("N", "match(-1)", "Previous match", show=False),
        Binding("s", "sharer(1)", "Sharing"),
        Binding("S", "sharer(-1)", "Back to what shares", show=False),
        Binding("space,enter", "fold", "Fold"),
        Binding("left,h", "close", "Fold, or go to what it is in", show=False),
        Binding("right,l", "open", "Unfold", show=False),
        Binding("e", "fold_all(False)", "Unfold all", show=False),
        Binding("E", "fold_all(True)", "Fold to the changes", show=False),
        Binding("m", "misses", "Misses"),
        Binding("d", "details", "Details"),
        Binding("J,shift+down", "scroll_details(1)", "Scroll the details", show=False),
        Binding("K,shift+up", "scroll_details(-1)", "Scroll the details back", show=False),
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "move(-1000000)", "First line", show=False),
        Binding("end,G", "move(1000000)", "Last line", show=False),
        Binding("escape", "leave_search", "Leave the search", show=False),
        Binding("question_mark", "help", "Keys", key_display="?"),
        Binding("q,ctrl+c", "quit", "Quit"),
    ]

    cursor: reactive[int] = reactive(0)

    def __init__(self, diff: Diff) -> None:
        super().__init__()
        self.diff = diff = diff.shown
        self.outline = Outline(diff)
        self.holders = {outer for item in self.outline.changed for outer in item.around()}
        self.lines = self.outline.visible()
        self.shared: set[Item] = set()
        self.matches: list[Item] = []

    @property
    def here(self) -> Item:
        return self.lines[self.cursor]

    def compose(self) -> ComposeResult:
        yield Static(summary(self.diff), id="summary")
        with Horizontal():
            yield Pane("tree", "modules")
            yield Pane("before", f"before: {self.diff.before.name}")
            yield Pane("after", f"after: {self.diff.after.name}")
        with VerticalScroll(id="details", can_focus=False):
            yield Static(markup=False)
        yield Input(placeholder="path, operation, weight, shape or rule; enter: next, esc: done", id="search")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self.show()
        if self.outline.changed:
            self.go(self.outline.changed, 1, "change")

    def show(self, item: Item | None = None) -> None:
        """Draws what is unfolded now, with the cursor on the item, or on what it is folded into."""
        item = item or self.here
        self.lines = self.outline.visible()
        shown = set(self.lines)
        target = next(one for one in (item, *item.around()) if one in shown)
        for pane in self.query(Pane):
            pane.virtual_size = Size(0, len(self.lines))
        self.set_reactive(Viewer.cursor, self.lines.index(target))
        self.watch_cursor()

    def validate_cursor(self, cursor: int) -> int:
        return min(max(cursor, 0), len(self.lines) - 1)

    def watch_cursor(self) -> None:
        shown = set(self.lines)
        sharing = self.outline.sharing(self.here)
        self.shared = {next(one for one in (item, *item.around()) if one in shown) for item in sharing}
        style = self.query_one("#tree", Pane).style
        lines = (Text(text, style(role)) for role, text in self.outline.details(self.here))
        self.query_one("#details Static", Static).update(Text("\n").join(lines))
        self.query_one("#details").scroll_home(animate=False)
        self.call_after_refresh(self.scroll_to_cursor)
        self.query(Pane).refresh()

    def scroll_to_cursor(self) -> None:
        """Keeps the cursor in sight, with a line of context where there is room."""
        pane = self.query_one("#before", Pane)
        top, height = pane.scroll_offset.y, pane.scrollable_content_region.height
        if not top <= self.cursor < top + height:
            self.scroll_together(max(0, self.cursor - height // 3))

    def scroll_together(self, y: float) -> None:
        for pane in self.query(Pane):
            if pane.scroll_y != y:
                pane.scroll_to(y=y, animate=False, immediate=True)

    def go(self, items: Sequence[Item], step: int, what: str) -> None:
        """To the next (1) or previous (-1) of some items, around the end; unfolds what it is in."""
        if not items:
            self.notify(f"no {what} here", timeout=2)
            return
        in_order = sorted(items, key=lambda item: step * item.place)
        item = next((item for item in in_order if step * item.place > step * self.here.place), in_order[0])
        number = in_order[::step].index(item) + 1
        self.query_one("#tree", Pane).border_title = f"modules: {what} {number} of {len(items)}"
        self.outline.reveal(item)
        if what == "change":
            self.outline.reveal_change(item)
        self.show(item)

    def action_change(self, step: int) -> None:
        self.go(self.outline.changed, step, "change")

    def action_match(self, step: int) -> None:
        self.go(self.matches, step, "match")

    def action_sharer(self, step: int) -> None:
        self.go(list(self.outline.sharing(self.here)), step, "sharer")

    def action_move(self, lines: int) -> None:
        self.cursor += lines

    def action_page(self, pages: int) -> None:
        self.cursor += pages * self.query_one("#before", Pane).scrollable_content_region.height

    def action_fold(self) -> None:
        self.here.is_open = not self.here.is_open
        self.show()

    def action_open(self) -> None:
        self.here.is_open = True
        self.show()

    def action_close(self) -> None:
        item = self.here if self.here.children and self.here.is_open else self.here.parent or self.here
        item.is_open = item.parent is None
        self.show(item)

    def action_fold_all(self, folded: bool) -> None:
        for item in self.outline.items:
            item.is_open = item in self.holders or not folded or item.parent is None
        self.show()

    def action_details(self) -> None:
        details = self.query_one("#details")
        details.display = not details.display
        self.call_after_refresh(self.scroll_to_cursor)

    def action_scroll_details(self, lines: int) -> None:
        self.query_one("#details").scroll_relative(y=lines, animate=False)

    def action_misses(self) -> None:
        def answer(module: str | None) -> None:
            if module is not None:
                self.go([self.outline.at(module)], 1, "miss")

        self.push_screen(Misses(self.diff), answer)

    def action_help(self) -> None:
        if self.screen.query("HelpPanel"):
            self.action_hide_help_panel()
        else:
            self.action_show_help_panel()

    def action_search(self) -> None:
        search = self.query_one("#search", Input)
        search.display = True
        search.focus()

    def action_leave_search(self) -> None:
        search = self.query_one("#search", Input)
        search.display = False
        self.set_focus(None)

    def on_input_changed(self, event: Input.Changed) -> None:
        self.matches = self.outline.matches(event.value) if event.value else []

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.action_leave_search()
        self.action_match(1)
