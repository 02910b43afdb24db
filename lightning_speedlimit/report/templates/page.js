"use strict";
// Sorts tables by their columns, explains a column when it is pointed at, and opens what is folded for printing.
{
  const read = (row, column) => row.cells[column].dataset.value ?? "";

  function compare(a, b, numeric, sign) {
    if (a === "" || b === "") return (a === "") - (b === ""); // undefined comes last, whichever way it is sorted
    return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  }

  function sort(table, header, status) {
    const headers = [...table.tHead.rows[0].cells];
    const column = headers.indexOf(header);
    const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of headers) other.setAttribute("aria-sort", other === header ? direction : "none");
    const sign = direction === "ascending" ? 1 : -1;
    const numeric = header.dataset.numeric === "yes";
    const body = table.tBodies[0];
    const rows = [...body.rows];
    rows.sort((a, b) => compare(read(a, column), read(b, column), numeric, sign) || a.dataset.place - b.dataset.place);
    body.append(...rows);
    status.textContent = `Sorted by ${header.textContent.trim()}, ${direction}.`;
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const status = document.getElementById(table.dataset.status);
    const hint = document.getElementById(table.dataset.hint);
    hint.hidden = false;
    const first = hint.textContent;
    for (const header of table.tHead.rows[0].cells) {
      const button = header.querySelector("button");
      button.disabled = false;
      button.title = "";
      button.addEventListener("click", () => sort(table, header, status));
      const meaning = document.getElementById(button.getAttribute("aria-describedby")).textContent;
      const explain = () => { hint.textContent = `${header.textContent.trim()}: ${meaning}`; };
      const calm = () => { hint.textContent = first; };
      for (const event of ["mouseenter", "focus"]) button.addEventListener(event, explain);
      for (const event of ["mouseleave", "blur"]) button.addEventListener(event, calm);
    }
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
}
