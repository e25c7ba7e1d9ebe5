// Markdown of an answer -> elements. HTML in an answer is never interpreted: it becomes text nodes.

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*(?!\*)|(?<![*\w])\*([^*\s](?:[^*]*[^*\s])?)\*(?!\w)|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;
const ITEM = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;

// A fragment with the paragraphs, headings, lists and code blocks of `text`. An unfinished one is rendered as far as it is.
export function render(text) {
  const page = document.createDocumentFragment();
  const lines = text.trim().split("\n");
  while (lines.length) page.append(block(lines) ?? "");
  return page;
}

// Removes the lines of one block from the start of `lines`.
function block(lines) {
  const line = lines.shift();
  if (!line.trim()) return null;
  const fence = line.match(/^\s*(```+|~~~+)/)?.[1];
  if (fence) {
    const code = [];
    while (lines.length && !lines[0].trim().startsWith(fence)) code.push(lines.shift());
    lines.shift();
    const block = element("pre", element("code", code.join("\n")));
    block.tabIndex = 0; // long lines scroll, by keyboard too
    return block;
  }
  const heading = line.match(/^#{1,6}\s+(.*?)\s*#*$/);
  if (heading) return element("h3", inline(heading[1]));
  const item = line.match(ITEM);
  if (item) {
    const list = element(item[1] ? "ol" : "ul", element("li", inline(item[2])));
    if (item[1]) list.start = Number(item[1]);
    for (let next; (next = lines[0]?.match(ITEM)) && Boolean(next[1]) === Boolean(item[1]); lines.shift()) {
      list.append(element("li", inline(next[2])));
    }
    return list;
  }
  const words = [line];
  while (lines[0]?.trim() && !/^\s*(```|~~~|#{1,6}\s)/.test(lines[0]) && !ITEM.test(lines[0])) words.push(lines.shift());
  return element("p", inline(words.join("\n")));
}

function inline(text) {
  const fragment = document.createDocumentFragment();
  for (let found; (found = text.match(INLINE)); text = text.slice(found.index + found[0].length)) {
    const [, , code, strong, emphasis, label, url] = found;
    fragment.append(text.slice(0, found.index));
    if (code) fragment.append(element("code", code));
    else if (strong) fragment.append(element("strong", inline(strong)));
    else if (emphasis) fragment.append(element("em", inline(emphasis)));
    else fragment.append(link(label, url));
  }
  fragment.append(text);
  return fragment;
}

function link(label, url) {
  const anchor = element("a", label);
  anchor.href = url;
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer";
  return anchor;
}

function element(name, content) {
  const made = document.createElement(name);
  made.append(content);
  return made;
}
