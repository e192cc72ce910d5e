// What a page says of itself, as JSON: its size and colours, and every text that is covered, cut or too small.
// Nothing of the page is changed. Texts that scroll sideways are cut by what they scroll in, and that counts as shown.
JSON.stringify((() => {
  const root = document.documentElement
  const name = text => text.trim().slice(0, 60)
  const labels = [], faults = []
  const folded = element => { // in a part that is folded, and not what it is called
    for (let each = element.closest('details:not([open])'); each; each = each.parentElement.closest('details:not([open])')) {
      if (!each.querySelector(':scope > summary').contains(element)) return true
    }
    return false
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement
    if (!node.data.trim() || parent.closest('title') || folded(parent)) continue
    const drawing = parent.closest('svg'), scroller = parent.closest('.scroll')
    const range = document.createRange()
    range.selectNodeContents(node)
    const boxes = drawing ? [parent.getBoundingClientRect()] : [...range.getClientRects()]
    for (const box of boxes) {
      if (box.width < 1 || box.height < 1) continue
      let {left, right, top, bottom} = box
      if (scroller) {
        const seen = scroller.getBoundingClientRect()
        left = Math.max(left, seen.left)
        right = Math.min(right, seen.right)
        if (right - left < 1) continue
      }
      labels.push({text: name(node.data), left, right, top, bottom, width: right - left})
      if (left < -0.5 || right > root.clientWidth + 0.5) faults.push(`${name(node.data)} | leaves the page`)
      if (drawing) {
        const sheet = drawing.getBoundingClientRect()
        const inside = left >= sheet.left - 1 && right <= sheet.right + 1 && top >= sheet.top - 1 && bottom <= sheet.bottom + 1
        if (!inside) faults.push(`${name(node.data)} | leaves its drawing`)
        if (bottom - top < 11) faults.push(`${name(node.data)} | is ${(bottom - top).toFixed(1)} pixels tall`)
      }
    }
  }
  labels.sort((a, b) => a.top - b.top)
  labels.forEach((one, k) => {
    for (let next = k + 1; next < labels.length && labels[next].top < one.bottom - 1; next++) {
      const other = labels[next]
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left)
      const down = Math.min(one.bottom, other.bottom) - other.top
      if (across > 1 && down > 1) faults.push(`${one.text} | covers | ${other.text}`)
    }
  })
  return {
    width: root.clientWidth,
    height: root.scrollHeight,
    overflow: root.scrollWidth - root.clientWidth,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    drawings: document.querySelectorAll('svg').length,
    hollow: [...document.querySelectorAll('section')].filter(each => each.children.length < 2).map(each => each.id),
    labels: labels.length,
    faults,
    scripts: document.scripts.length,
    fetched: performance.getEntriesByType('resource').filter(each => !each.name.startsWith('data:')).length,
  }
})())
